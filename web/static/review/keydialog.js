// The sheet of keys, and changing them: press a key's button, then the key that shall stand there.

import { toast } from "../app.js";
import { drawn } from "./keys.js";

const MODIFIERS = ["Shift", "Control", "Alt", "AltGraph", "Meta", "CapsLock"];

export class KeyDialog {
  constructor(dialog, keyOf, { save, changed }) {
    this.dialog = dialog;
    this.keyOf = keyOf;
    this.usual = JSON.parse(dialog.dataset.usual);
    this.on = { save, changed };
    this.asked = null; // the action whose new key is awaited
    this.note = dialog.querySelector("[data-keys-note]");
    dialog.addEventListener("click", (event) => {
      const button = event.target.closest("[data-rebind]");
      if (button) this.#ask(button.dataset.rebind);
      if (event.target.closest("[data-keys-usual]")) this.#store({});
    });
    dialog.addEventListener("keydown", (event) => this.#press(event));
    dialog.addEventListener("close", () => this.#ask(null));
  }

  open() {
    this.dialog.showModal();
  }

  #ask(action) {
    this.asked = action;
    this.dialog.querySelectorAll("[data-rebind]").forEach((button) => {
      const waiting = button.dataset.rebind === action;
      button.classList.toggle("asked", waiting);
      button.querySelector("kbd").textContent = waiting ? "press" : drawn(this.keyOf[button.dataset.rebind]);
    });
    if (action) this.note.textContent = "Press the new key. Esc keeps the old one.";
  }

  #press(event) {
    if (!this.asked || MODIFIERS.includes(event.key)) return;
    event.preventDefault();
    event.stopPropagation();
    const action = this.asked;
    const other = Object.keys(this.keyOf).find((one) => this.keyOf[one] === event.key && one !== action);
    this.#ask(null);
    if (event.key === "Escape" || this.keyOf[action] === event.key) {
      this.note.textContent = "";
      return;
    }
    const chosen = { ...this.keyOf, [action]: event.key };
    if (other) chosen[other] = this.keyOf[action]; // the two change places, so no action is left without a key
    this.#store(chosen, other ? `${drawn(event.key)} was ${other}, which is now ${drawn(chosen[other])}.` : "");
  }

  async #store(chosen, note = "") {
    try {
      this.keyOf = (await this.on.save(chosen)).keys;
      this.note.textContent = note || "Stored for you.";
      this.on.changed(this.keyOf);
    } catch (error) {
      this.note.textContent = "";
      toast(`Not changed: ${error.message}.`, "bad");
    }
  }
}
