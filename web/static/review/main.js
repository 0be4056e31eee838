// The review page: which item is in front of the reviewer, what they have decided, and where it goes.

import { recall, remember, toast } from "../app.js";
import { SKIP_REASONS, draftOf, emptyDraft, missing, toBody, touched } from "./draft.js";
import { Flagging } from "./flagging.js";
import { KeyDialog } from "./keydialog.js";
import { Keys } from "./keys.js";
import { Outbox } from "./outbox.js";
import { tooLong, withSpan } from "./spans.js";
import { Transport } from "./transport.js";
import { View } from "./view.js";

const RENEW_MS = 30000;
const IDLE_MS = 10 * 60000; // nobody is here: let the leases go to those who are
const PAUSE_MS = 30000; // longer silences are not counted as attention
const LOOK_AGAIN_MS = 8000;

class Review {
  constructor(root) {
    this.kind = root.dataset.queue;
    this.transport = new Transport(root.dataset.slug);
    this.prefix = `whet:${root.dataset.slug}:${root.dataset.user}`;
    this.queue = [];
    this.past = [];
    this.back = 0; // how far into the past the reviewer looks; 0 is the item to judge
    this.tags = [];
    this.draft = null;
    this.letters = false;
    this.turn = 0; // counts what changed the queue from this side
    this.undoes = Promise.resolve();
    this.lastInput = performance.now();
    this.view = new View(root, (name) => this.act(name), (change) => this.edited(change));
    this.flagging = new Flagging(this.view.at("response"));
    const keyOf = JSON.parse(root.dataset.keys);
    this.keys = new Keys((name) => this.act(name), keyOf);
    this.keys.capture = (event) => this.flagging.name(event);
    this.keyDialog = new KeyDialog(this.view.at("help"), keyOf, {
      save: (keys) => this.transport.chooseKeys(keys),
      changed: (keys) => this.keys.use(keys),
    });
    this.outbox = new Outbox(`${this.prefix}:outbox`, this.transport, {
      stored: (entry, answer) => this.stored(entry, answer),
      refused: (entry, error) => this.refused(entry, error),
      changed: () => this.showSaving(),
    });
  }

  async start() {
    for (const name of ["keydown", "pointerdown"]) document.addEventListener(name, () => this.noticeInput(), true);
    setInterval(() => this.countAttention(), 1000);
    setInterval(() => this.renew(), RENEW_MS);
    this.outbox.resume();
    await this.fill();
    this.rememberPast();
  }

  get item() {
    return this.queue[0] ?? null;
  }

  // --- the queue -------------------------------------------------------------------------------------------

  // One request at a time: of two at once the second would be given other items than the first holds.
  fill() {
    this.filling ??= this.refill().finally(() => { this.filling = null; });
    return this.filling;
  }

  async refill() {
    clearTimeout(this.again);
    const { turn } = this;
    const before = this.item?.id;
    try {
      const answer = await this.transport.lease(this.kind, this.queue.length);
      if (turn !== this.turn) return this.refill(); // what was answered is older than what was judged or undone since
      this.tags = answer.tags;
      this.adopt(answer.items);
      this.unreachable = false;
    } catch (error) {
      this.unreachable = error.message;
    }
    if (this.item?.id !== before || !this.item) this.show();
    if (!this.item || this.unreachable) this.again = setTimeout(() => this.fill(), LOOK_AGAIN_MS);
    this.showSaving();
    return undefined;
  }

  // The server's word on which items are held; those already judged here are on their way out.
  adopt(items) {
    const leaving = new Set(this.outbox.entries.map((entry) => entry.itemId));
    const held = new Map(items.filter((item) => !leaving.has(item.id)).map((item) => [item.id, item]));
    const current = this.item;
    if (current && !held.has(current.id)) {
      toast("This item went to another reviewer; what you wrote is still in the draft.", "bad");
    }
    this.queue = this.queue.filter((item) => held.has(item.id)).map((item) => held.get(item.id));
    const known = new Set(this.queue.map((item) => item.id));
    for (const item of held.values()) if (!known.has(item.id)) this.queue.push(item);
  }

  renew() {
    if (performance.now() - this.lastInput < IDLE_MS && !document.hidden) this.fill();
  }

  noticeInput() {
    const away = performance.now() - this.lastInput > IDLE_MS;
    this.lastInput = performance.now();
    if (away) this.fill();
  }

  countAttention() {
    const here = !document.hidden && performance.now() - this.lastInput < PAUSE_MS;
    if (here && this.draft && this.back === 0) this.draft.activeMs += 1000;
  }

  // --- what is shown -----------------------------------------------------------------------------------------

  show() {
    this.back = 0;
    this.flagging.leave();
    this.draft = this.item ? this.loadDraft(this.item) : null;
    this.keys.itemShown();
    this.began = performance.now();
    if (!this.item) this.view.nothing(this.unreachable, this.kind);
    else {
      this.view.item(this.item);
      this.view.focusPage();
    }
    this.render();
  }

  get looking() {
    return this.back > 0 ? this.past[this.past.length - this.back] : null;
  }

  render() {
    const looking = this.looking;
    this.view.render({
      item: looking?.item ?? this.item,
      draft: looking?.draft ?? this.draft,
      past: looking,
      tags: this.tags,
      reasons: SKIP_REASONS,
      letters: this.letters,
      pending: this.flagging.at,
      ready: this.ready(),
      undoable: this.past.length > 0,
      place: looking ? `${this.back} back` : "",
    });
    this.showSaving();
  }

  look(step) {
    const next = Math.min(Math.max(this.back + step, 0), this.past.length);
    if (next === this.back) return;
    this.back = next;
    this.flagging.leave();
    const item = this.looking?.item ?? this.item;
    if (item) this.view.item(item);
    else this.view.nothing(this.unreachable, this.kind);
    this.keys.itemShown();
    this.render();
  }

  // Judgements from before the page was loaded: looking back and undoing go on where they were.
  async rememberPast() {
    let judged;
    try {
      ({ judged } = await this.transport.history());
    } catch {
      return; // what was judged since the page was loaded is there all the same
    }
    const known = new Set(this.past.map((one) => one.annotationId));
    const waiting = new Set(this.outbox.entries.map((entry) => entry.itemId));
    const earlier = judged
      .filter((one) => !known.has(one.annotation_id) && !waiting.has(one.item.id))
      .filter((one) => one.reveal.adjudicates === (this.kind === "disputed")) // undone, it waits where it was judged
      .map(({ item, annotation_id: annotationId, judgement, reveal }) => (
        { item, draft: draftOf(item, judgement), key: null, annotationId, reveal }
      ));
    this.past = [...earlier, ...this.past];
    this.render();
  }

  // --- drafts -------------------------------------------------------------------------------------------------

  loadDraft(item) {
    try {
      return { ...emptyDraft(item), ...JSON.parse(recall(`${this.prefix}:draft:${item.id}`) ?? "{}") };
    } catch {
      return emptyDraft(item); // an unreadable draft is no draft
    }
  }

  keepDraft() {
    this.draftKept = remember(`${this.prefix}:draft:${this.item.id}`, JSON.stringify(this.draft));
    this.showSaving();
  }

  edited(change) {
    if (!this.draft || this.back > 0) return;
    Object.assign(this.draft, change);
    if ("text" in change) {
      const differs = this.draft.text !== this.item.output;
      if (differs) this.draft.verdict = "correct";
      else if (this.draft.verdict === "correct") this.draft.verdict = null;
    }
    this.keepDraft();
    this.render();
  }

  ready() {
    return Boolean(this.draft) && this.back === 0 && !missing(this.item, this.draft);
  }

  // --- actions ------------------------------------------------------------------------------------------------

  act(name) {
    const everywhere = {
      help: () => this.keyDialog.open(), guidelines: () => this.view.toggleGuidelines(), undo: () => this.undo(),
      older: () => this.look(1), newer: () => this.look(-1), escape: () => this.view.escape(), gold: () => this.gold(),
      more: () => { this.view.showWhole(); this.render(); },
      tint: () => { this.view.toggleTint(); this.render(); }, diff: () => { this.letters = !this.letters; this.render(); },
    };
    if (everywhere[name]) return everywhere[name]();
    if (!this.item || this.back > 0) return undefined;
    const [word, detail, number] = name.split(" ");
    if (word === "pick") return this.pick(Number(detail));
    if (word === "span") return this.flag(detail, Number(number));
    if (word === "unflag") return this.edited({ spans: this.draft.spans.filter((_, place) => place !== Number(detail)) });
    if (word === "adopt") return this.takeOver(Number(detail));
    if (["left", "right", "tie"].includes(name)) return this.side(name);
    if (name === "submit") return this.submit();
    if (name === "comment") return this.view.focusComment();
    return this.choose(name === "edit" ? "correct" : name);
  }

  choose(verdict) {
    if (this.item.pair && ["accept", "correct"].includes(verdict)) return;
    this.flagging.leave();
    this.draft.verdict = verdict;
    this.draft.preference = null;
    this.keepDraft();
    this.render();
    if (verdict === "correct") this.view.focusEditor();
    if (verdict === "escalate") this.view.focusComment();
  }

  // [ ] = choose in a pair; where judges disagree they take over what one of them said.
  side(name) {
    if (this.item.dispute.length && name !== "tie") this.takeOver(name === "left" ? 0 : 1);
    else if (this.item.pair) this.edited({ verdict: "prefer", preference: name });
  }

  takeOver(place) {
    const said = this.item.dispute[place];
    if (!said) return;
    const { verdict, text, preference, tags, spans } = draftOf(this.item, said);
    Object.assign(this.draft, { verdict, text, preference, tags, spans });
    this.keepDraft();
    this.render();
    this.view.focusComment();
  }

  pick(number) {
    if (this.draft.verdict === "skip") {
      const reason = SKIP_REASONS[number - 1];
      if (reason) this.edited({ reason: this.draft.reason === reason ? null : reason });
      return;
    }
    const tag = this.tags[number - 1];
    if (!tag) return;
    const tags = this.draft.tags.includes(tag) ? this.draft.tags.filter((other) => other !== tag) : [...this.draft.tags, tag];
    this.edited({ tags });
  }

  flag(how, number) {
    const text = this.item.output;
    if (how === undefined) this.beginFlag(text);
    else if (how === "leave") this.flagging.leave();
    else if (how === "move" || how === "stretch") this.flagging.move(text, number, how === "stretch");
    else if (this.flagging.at) {
      const tag = how === "tag" ? this.tags[number - 1] : null;
      if (tag === undefined) return;
      const span = { ...this.flagging.at, tag };
      this.flagging.leave();
      if (tooLong(span)) toast("A flagged span is at most 2,000 characters long.");
      else this.edited({ spans: withSpan(this.draft.spans, span) });
    }
    this.render();
    if (this.flagging.at) this.view.showPending();
  }

  beginFlag(text) {
    if (this.item.pair || this.draft.verdict === "correct") {
      toast(this.item.pair ? "Spans are flagged in single responses." : "Flag spans before you edit; another verdict leaves the editor.");
    } else if (!this.flagging.begin(text)) toast("There is nothing to flag.");
    else this.view.hideTint();
  }

  submit() {
    const lacking = missing(this.item, this.draft);
    if (lacking) {
      toast(lacking);
      return;
    }
    this.turn += 1;
    const item = this.queue.shift();
    const draft = this.draft;
    draft.activeMs += Math.min(999, Math.round(performance.now() - this.began) % 1000);
    this.past.push({ item, draft, key: draft.key, annotationId: null, reveal: null });
    this.outbox.add(item.id, toBody(item, draft));
    remember(`${this.prefix}:draft:${item.id}`, null);
    this.show();
    this.fill();
  }

  stored(entry, answer) {
    const judged = this.past.find((one) => one.key === entry.body.idempotency_key);
    if (judged) {
      judged.annotationId = answer.id;
      judged.reveal = answer;
      this.revealed = judged;
      this.view.reveal(judged);
      judged.whenStored?.();
    }
    this.refreshProgress();
    this.render();
    if (this.unreachable) this.fill();
  }

  refused(entry, error) {
    const judged = this.past.find((one) => one.key === entry.body.idempotency_key);
    if (judged) {
      this.past = this.past.filter((one) => one !== judged);
      this.back = 0;
      remember(`${this.prefix}:draft:${entry.itemId}`, JSON.stringify({ ...judged.draft, key: crypto.randomUUID() }));
      judged.whenStored?.();
    }
    toast(`Not stored: ${error.message}.`, "bad");
    this.render();
    this.fill();
  }

  // One after the other, the newest first, however fast the key is pressed.
  undo() {
    const chosen = this.looking;
    this.undoes = this.undoes.then(() => this.undoOne(chosen));
  }

  async undoOne(chosen) {
    const entry = this.past.includes(chosen) ? chosen : this.past.at(-1);
    if (!entry) {
      toast("There is nothing to undo.");
      return;
    }
    try {
      await this.takeBack(entry);
    } catch (error) {
      toast(`Not undone: ${error.message}.`, "bad");
    }
  }

  async takeBack(entry) {
    if (!entry.key || !this.outbox.takeBack(entry.key)) {
      if (!entry.annotationId) await new Promise((resolve) => { entry.whenStored = resolve; });
      if (!entry.annotationId) return;
      const answer = await this.transport.undo(entry.annotationId);
      entry.item.lease_token = answer.lease_token;
      if (!answer.lease_token) toast("Undone. The item waits for somebody else now.");
    }
    this.turn += 1;
    this.past = this.past.filter((one) => one !== entry);
    if (entry.item.lease_token) {
      remember(`${this.prefix}:draft:${entry.item.id}`, JSON.stringify({ ...entry.draft, key: crypto.randomUUID() }));
      this.queue = [entry.item, ...this.queue.filter((item) => item.id !== entry.item.id)];
    }
    this.revealed = null;
    this.view.reveal(null);
    this.show();
    this.refreshProgress();
  }

  async gold() {
    if (!this.revealed) return;
    try {
      await this.transport.markGold(this.revealed.item.id);
      toast("Reviewers who have not seen it will be checked by it.");
    } catch (error) {
      toast(`Not marked: ${error.message}.`, "bad");
    }
  }

  // --- the bottom line ---------------------------------------------------------------------------------------

  async refreshProgress() {
    try {
      this.view.progress(await this.transport.progress());
    } catch {
      // Figures may be old for a moment; the next judgement brings them.
    }
  }

  showSaving() {
    const waiting = this.outbox.size;
    if (this.outbox.offline) this.view.saving("offline", `Offline: ${waiting} kept here, trying again`);
    else if (waiting) this.view.saving("busy", "Saving");
    else if (this.unreachable) this.view.saving("offline", "Offline: trying again");
    else if (this.draft && this.item && touched(this.item, this.draft)) {
      this.view.saving("draft", this.draftKept === false ? "Draft not kept: storage is off" : "Draft kept here");
    } else this.view.saving("", "Saved");
  }
}

new Review(document.querySelector("[data-review]")).start();
