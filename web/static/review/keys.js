// Keys to actions. A held key never reaches an item nobody has seen: repeats are ignored, and a key that was down when
// the item appeared does nothing until it has been let go.

import { writes } from "../app.js";

const SHORTEST_LOOK_MS = 250;
const DRAWN = { ArrowLeft: "←", ArrowRight: "→", ArrowUp: "↑", ArrowDown: "↓" };

export function drawn(key) {
  return DRAWN[key] ?? key;
}

export class Keys {
  constructor(act, keyOf) {
    this.act = act;
    this.use(keyOf);
    this.capture = null; // while set, this takes the key first: event -> an action's name, or null
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

  // Which key stands for which action; the page shows the same.
  use(keyOf) {
    this.actions = new Map(Object.entries(keyOf).map(([action, key]) => [key, action]));
    document.querySelectorAll("[data-key-of]").forEach((shown) => {
      shown.textContent = drawn(keyOf[shown.dataset.keyOf]);
    });
  }

  // Call when another item comes into view.
  itemShown() {
    this.stale = new Set(this.down);
    this.shownAt = performance.now();
  }

  #press(event) {
    const held = event.repeat || this.stale.has(event.code);
    this.down.add(event.code);
    if (document.querySelector("dialog[open]")) return;
    const typing = writes(event.target);
    const name = (typing ? null : this.capture?.(event)) ?? this.#name(event, typing);
    if (name === null) return;
    event.preventDefault();
    if (held && !name.startsWith("span ")) return;
    if (name === "submit" && performance.now() - this.shownAt < SHORTEST_LOOK_MS) return;
    this.act(name);
  }

  #name(event, typing) {
    const command = (event.ctrlKey || event.metaKey) && !event.getModifierState("AltGraph");
    if (event.key === "Enter" && (command || !typing)) return this.#onButton(event, command) ? null : "submit";
    if (event.key === "Escape") return "escape";
    const alone = !command && (!event.altKey || event.getModifierState("AltGraph")); // [ and ] take AltGr on many layouts
    if (typing || !alone) return null;
    if (/^[1-9]$/.test(event.key)) return `pick ${event.key}`;
    const key = event.getModifierState("CapsLock") ? event.key.toLowerCase() : event.key;
    return this.actions.get(key) ?? null;
  }

  // Enter on a focused button or link presses that, as everywhere.
  #onButton(event, command) {
    return !command && event.target.matches?.("button:not([data-verdict]), a, summary");
  }
}
