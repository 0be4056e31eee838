// Keys to actions. A held key never reaches an item nobody has seen: repeats are ignored, and a key that was down when
// the item appeared does nothing until it has been let go.

const SHORTEST_LOOK_MS = 250;

export class Keys {
  constructor(act) {
    this.act = act;
    this.down = new Set();
    this.stale = new Set();
    this.shownAt = 0;
    document.addEventListener("keydown", (event) => this.#press(event));
    document.addEventListener("keyup", (event) => {
      this.down.delete(event.code);
      this.stale.delete(event.code);
    });
    addEventListener("blur", () => this.down.clear());
  }

  // Call when another item comes into view.
  itemShown() {
    this.stale = new Set(this.down);
    this.shownAt = performance.now();
  }

  #press(event) {
    const held = event.repeat || this.stale.has(event.code);
    this.down.add(event.code);
    const typing = event.target.matches?.("textarea, input, select");
    const name = this.#name(event, typing);
    if (name === null || document.querySelector("dialog[open]")) return;
    event.preventDefault();
    if (held) return;
    if (name === "submit" && performance.now() - this.shownAt < SHORTEST_LOOK_MS) return;
    this.act(name);
  }

  #name(event, typing) {
    const command = event.ctrlKey || event.metaKey;
    if (event.key === "Enter" && (command || !typing)) return this.#onButton(event, command) ? null : "submit";
    if (event.key === "Escape") return "escape";
    if (typing || command || event.altKey) return null;
    if (/^[1-9]$/.test(event.key)) return `pick ${event.key}`;
    const plain = {
      a: "accept", x: "reject", e: "edit", k: "skip", f: "escalate", u: "undo", c: "comment", d: "diff", p: "tint",
      g: "guidelines", "?": "help", ArrowLeft: "older", ArrowRight: "newer",
    };
    return plain[event.key] ?? null;
  }

  // Enter on a focused button or link presses that, as everywhere.
  #onButton(event, command) {
    return !command && event.target.matches?.("button:not([data-verdict]), a, summary");
  }
}
