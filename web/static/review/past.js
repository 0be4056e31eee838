// What this reviewer has judged: looking back at it, and taking it back, the newest first.

import { draftOf } from "./draft.js";

export class Past {
  // `returned` is told which judgement is undone, `changed` that there is more or less to look at; `say` shows a sentence.
  constructor(transport, outbox, kind, { returned, changed, say }) {
    this.transport = transport;
    this.outbox = outbox;
    this.kind = kind;
    this.on = { returned, changed, say };
    this.entries = [];
    this.back = 0; // how far into the past the reviewer looks; 0 is the item to judge
    this.undoes = Promise.resolve();
  }

  get looking() {
    return this.back > 0 ? this.entries[this.entries.length - this.back] : null;
  }

  // Whether there was anywhere to go.
  look(step) {
    const next = Math.min(Math.max(this.back + step, 0), this.entries.length);
    const moved = next !== this.back;
    this.back = next;
    return moved;
  }

  add(item, draft) {
    this.entries.push({ item, draft, key: draft.key, annotationId: null, reveal: null });
  }

  // The judgement that a sent body was, if it was made since the page was loaded.
  sent(body) {
    return this.entries.find((one) => one.key === body.idempotency_key);
  }

  stored(entry, answer) {
    entry.annotationId = answer.id;
    entry.reveal = answer;
    entry.whenStored?.();
  }

  refused(entry) {
    this.#drop(entry);
    this.back = 0;
    entry.whenStored?.();
  }

  // Judgements from before the page was loaded: looking back and undoing go on where they were.
  async remember() {
    let judged;
    try {
      ({ judged } = await this.transport.history());
    } catch {
      return; // what was judged since the page was loaded is there all the same
    }
    const known = new Set(this.entries.map((one) => one.annotationId));
    const waiting = new Set(this.outbox.entries.map((entry) => entry.itemId));
    const earlier = judged
      .filter((one) => !known.has(one.annotation_id) && !waiting.has(one.item.id))
      .filter((one) => one.reveal.adjudicates === (this.kind === "disputed")) // undone, it waits where it was judged
      .map(({ item, annotation_id: annotationId, judgement, reveal }) => (
        { item, draft: draftOf(item, judgement), key: null, annotationId, reveal }
      ));
    this.entries = [...earlier, ...this.entries];
    this.on.changed();
  }

  // One after the other, the newest first, however fast the key is pressed.
  undo() {
    const chosen = this.looking;
    this.undoes = this.undoes.then(() => this.#undoOne(chosen));
  }

  async #undoOne(chosen) {
    const entry = this.entries.includes(chosen) ? chosen : this.entries.at(-1);
    if (!entry) {
      this.on.say("There is nothing to undo.");
      return;
    }
    try {
      await this.#takeBack(entry);
    } catch (error) {
      this.on.say(`Not undone: ${error.message}.`, "bad");
    }
  }

  async #takeBack(entry) {
    if (!entry.key || !this.outbox.takeBack(entry.key)) {
      if (!entry.annotationId) await new Promise((resolve) => { entry.whenStored = resolve; });
      if (!entry.annotationId) return;
      const answer = await this.transport.undo(entry.annotationId);
      entry.item.lease_token = answer.lease_token;
      if (!answer.lease_token) this.on.say("Undone. The item waits for somebody else now.");
    }
    this.#drop(entry);
    this.on.returned(entry);
  }

  #drop(entry) {
    this.entries = this.entries.filter((one) => one !== entry);
  }
}
