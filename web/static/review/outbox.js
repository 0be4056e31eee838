// Judgements on their way to the server. Each is kept in local storage until it is acknowledged, so a lost connection
// or a closed tab loses none; each is sent in order, again and again under one idempotency key.

import { recall, remember } from "../app.js";
import { Refused } from "./transport.js";

const LONGEST_WAIT = 15000;

export class Outbox {
  constructor(key, transport, { stored, refused, changed }) {
    this.key = key;
    this.transport = transport;
    this.on = { stored, refused, changed };
    this.entries = this.#load();
    this.sending = null;
    this.offline = false;
    this.wait = 500;
    addEventListener("online", () => this.#drain());
  }

  get size() {
    return this.entries.length;
  }

  add(itemId, body) {
    this.entries.push({ itemId, body });
    this.#changed();
    this.#drain();
  }

  // Takes an unsent judgement back. False when it is being sent or was sent.
  takeBack(idempotencyKey) {
    const index = this.entries.findIndex((entry) => entry.body.idempotency_key === idempotencyKey);
    if (index < 0 || this.entries[index] === this.sending) return false;
    this.entries.splice(index, 1);
    this.#changed();
    return true;
  }

  resume() {
    this.#drain();
  }

  async #drain() {
    if (this.sending || !this.entries.length) return;
    this.sending = this.entries[0];
    const entry = this.sending;
    let answer = null;
    let refusal = null;
    try {
      answer = await this.transport.annotate(entry.itemId, entry.body);
    } catch (error) {
      if (error instanceof Refused && error.status !== 401) refusal = error;
    }
    this.sending = null;
    if (answer === null && refusal === null) {
      this.#retryLater();
      return;
    }
    this.offline = false;
    this.wait = 500;
    this.entries.shift();
    this.#changed();
    if (refusal) this.on.refused(entry, refusal);
    else this.on.stored(entry, answer);
    this.#drain();
  }

  #retryLater() {
    this.offline = true;
    this.#changed();
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.#drain(), this.wait);
    this.wait = Math.min(this.wait * 2, LONGEST_WAIT);
  }

  #changed() {
    this.kept = remember(this.key, this.entries.length ? JSON.stringify(this.entries) : null);
    this.on.changed(this);
  }

  #load() {
    try {
      return JSON.parse(recall(this.key) ?? "[]");
    } catch {
      return []; // not ours any more; an unreadable outbox must not stop the page
    }
  }
}
