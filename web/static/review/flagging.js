// Choosing a span of the response to flag: with the mouse, or word by word with the arrow keys.

import { moved, selectedIn, tooLong, wordFrom } from "./spans.js";

export class Flagging {
  constructor(area) {
    this.area = area;
    this.at = null; // the span being chosen, or null
  }

  // Starts at what is selected, else at the first word. False when there is nothing to flag.
  begin(text) {
    this.at = selectedIn(this.area) ?? wordFrom(text, 0);
    getSelection().removeAllRanges();
    return this.at !== null;
  }

  leave() {
    this.at = null;
  }

  // What a key means while a span is being chosen; null leaves it its usual meaning.
  name(event) {
    if (!this.at || event.ctrlKey || event.metaKey || event.altKey) return null;
    if (event.key === "ArrowLeft" || event.key === "ArrowRight") {
      return `span ${event.shiftKey ? "stretch" : "move"} ${event.key === "ArrowRight" ? 1 : -1}`;
    }
    if (/^[1-9]$/.test(event.key)) return `span tag ${event.key}`;
    return { Enter: "span keep", Escape: "span leave", Backspace: "span leave" }[event.key] ?? null;
  }

  move(text, step, stretch) {
    const next = moved(text, this.at, step, stretch);
    if (!tooLong(next)) this.at = next;
  }
}
