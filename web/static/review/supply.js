// The items held for this reviewer: five at a time, renewed while somebody is here, let go when nobody is.

const RENEW_MS = 30000;
const IDLE_MS = 10 * 60000; // nobody is here: let the leases go to those who are
const LOOK_AGAIN_MS = 8000;
const LOW = 3; // fewer than these are there: fetch more. What is held comes along each time, so not after every judgement

export class Supply {
  // `leaving()` names the items whose judgement is on its way; `lost` and `filled` are told what became of the queue.
  constructor(transport, kind, { leaving, lost, filled }) {
    this.transport = transport;
    this.kind = kind;
    this.on = { leaving, lost, filled };
    this.queue = [];
    this.tags = [];
    this.unreachable = false; // or why, in words
    this.turn = 0; // counts what changed the queue from this side
    this.lastInput = performance.now();
  }

  start() {
    for (const name of ["keydown", "pointerdown"]) document.addEventListener(name, () => this.#noticeInput(), true);
    setInterval(() => this.#renew(), RENEW_MS);
    return this.fill();
  }

  get item() {
    return this.queue[0] ?? null;
  }

  // How long nobody has touched anything.
  get silence() {
    return performance.now() - this.lastInput;
  }

  take() {
    this.turn += 1;
    return this.queue.shift();
  }

  putBack(item) {
    this.turn += 1;
    if (item.lease_token) this.queue = [item, ...this.queue.filter((other) => other.id !== item.id)];
  }

  // After a judgement: more, before the reviewer gets to the last one.
  topUp() {
    if (this.queue.length < LOW) this.fill();
  }

  // One request at a time: of two at once the second would be given other items than the first holds.
  fill() {
    this.filling ??= this.#refill().finally(() => { this.filling = null; });
    return this.filling;
  }

  async #refill() {
    clearTimeout(this.again);
    const { turn } = this;
    const before = this.item?.id;
    try {
      const answer = await this.transport.lease(this.kind, this.queue.length);
      if (turn !== this.turn) return this.#refill(); // what was answered is older than what was judged or undone since
      this.tags = answer.tags;
      this.#adopt(answer.items);
      this.unreachable = false;
    } catch (error) {
      this.unreachable = error.message;
    }
    if (!this.item || this.unreachable) this.again = setTimeout(() => this.fill(), LOOK_AGAIN_MS);
    this.on.filled(this.item?.id !== before || !this.item);
    return undefined;
  }

  // The server's word on which items are held; those already judged here are on their way out.
  #adopt(items) {
    const leaving = this.on.leaving();
    const held = new Map(items.filter((item) => !leaving.has(item.id)).map((item) => [item.id, item]));
    if (this.item && !held.has(this.item.id)) this.on.lost();
    this.queue = this.queue.filter((item) => held.has(item.id)).map((item) => held.get(item.id));
    const known = new Set(this.queue.map((item) => item.id));
    for (const item of held.values()) if (!known.has(item.id)) this.queue.push(item);
  }

  #renew() {
    if (this.silence < IDLE_MS && !document.hidden) this.fill();
  }

  #noticeInput() {
    const away = this.silence > IDLE_MS;
    this.lastInput = performance.now();
    if (away) this.fill();
  }
}
