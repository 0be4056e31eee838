// Asks the schema worker about a text, one question at a time, the newest next; a worker that does not answer is ended.

const SLOWEST_MS = 500;
export const TOO_SLOW = "not checked: its schema takes too long";

export class Checker {
  // `told` gets the question it asked and its problems: a list, null when there is nothing to hold the text to.
  constructor(told) {
    this.told = told;
    this.worker = null;
    this.asking = null;
    this.next = null;
    this.number = 0;
  }

  ask(question) {
    this.next = question;
    if (this.asking === null) this.#send();
  }

  #send() {
    const question = this.next;
    this.next = null;
    if (question === null) return;
    this.asking = question;
    this.number += 1;
    if (this.worker) this.#allow(SLOWEST_MS);
    else this.worker = this.#hire(); // it says when it is there; loading it is not the schema's fault
    this.worker.postMessage({ ...question, number: this.number });
  }

  #hire() {
    const worker = new Worker("/static/review/schema-worker.js", { type: "module" });
    worker.addEventListener("message", ({ data }) => {
      if (data.ready) this.#allow(SLOWEST_MS);
      else if (data.number === this.number) this.#answer(data.problems);
    });
    worker.addEventListener("error", () => this.#giveUp(null));
    return worker;
  }

  #allow(milliseconds) {
    this.timer = setTimeout(() => this.#giveUp([TOO_SLOW]), milliseconds);
  }

  #giveUp(problems) {
    this.worker?.terminate();
    this.worker = null;
    this.#answer(problems);
  }

  #answer(problems) {
    clearTimeout(this.timer);
    const question = this.asking;
    this.asking = null;
    if (question !== null) this.told(question, problems);
    this.#send();
  }
}
