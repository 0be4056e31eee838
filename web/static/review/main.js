// The review page: which item is in front of the reviewer, what they have decided, and where it goes.

import { recall, remember, toast } from "../app.js";
import { Keys } from "./keys.js";
import { Outbox } from "./outbox.js";
import { Transport } from "./transport.js";
import { View } from "./view.js";

const RENEW_MS = 30000;
const IDLE_MS = 10 * 60000; // nobody is here: let the leases go to those who are
const PAUSE_MS = 30000; // longer silences are not counted as attention
const LOOK_AGAIN_MS = 8000;
const UNDO_DEPTH = 20;
const SKIP_REASONS = ["unclear", "needs an expert", "broken text", "not my language"];

class Review {
  constructor(root) {
    this.escalated = root.dataset.escalated === "yes";
    this.transport = new Transport(root.dataset.slug);
    this.prefix = `whet:${root.dataset.slug}:${root.dataset.user}`;
    this.queue = [];
    this.past = [];
    this.back = 0; // how far into the past the reviewer looks; 0 is the item to judge
    this.tags = [];
    this.draft = null;
    this.letters = false;
    this.lastInput = performance.now();
    this.view = new View(root, (name) => this.act(name), (change) => this.edited(change));
    this.keys = new Keys((name) => this.act(name));
    this.outbox = new Outbox(`${this.prefix}:outbox`, this.transport, {
      stored: (entry, answer) => this.stored(entry, answer),
      refused: (entry, error) => this.refused(entry, error),
      changed: () => this.showSaving(),
    });
  }

  start() {
    for (const name of ["keydown", "pointerdown"]) document.addEventListener(name, () => this.noticeInput(), true);
    setInterval(() => this.countAttention(), 1000);
    setInterval(() => this.renew(), RENEW_MS);
    this.outbox.resume();
    this.fill();
  }

  get item() {
    return this.queue[0] ?? null;
  }

  // --- the queue -------------------------------------------------------------------------------------------

  async fill() {
    clearTimeout(this.again);
    const before = this.item?.id;
    try {
      const answer = await this.transport.lease(this.escalated);
      this.tags = answer.tags;
      this.adopt(answer.items);
      this.unreachable = false;
    } catch (error) {
      this.unreachable = error.message;
    }
    if (this.item?.id !== before || !this.item) this.show();
    if (!this.item || this.unreachable) this.again = setTimeout(() => this.fill(), LOOK_AGAIN_MS);
    this.showSaving();
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
    this.draft = this.item ? this.loadDraft(this.item) : null;
    this.keys.itemShown();
    this.began = performance.now();
    if (!this.item) this.view.nothing(this.unreachable, this.escalated);
    else {
      this.view.item(this.item);
      this.view.focusPage();
    }
    this.render();
  }

  render() {
    const looking = this.back > 0 ? this.past[this.past.length - this.back] : null;
    this.view.render({
      item: looking?.item ?? this.item,
      draft: looking?.draft ?? this.draft,
      past: looking,
      tags: this.tags,
      reasons: SKIP_REASONS,
      letters: this.letters,
      ready: this.ready(),
      undoable: this.past.some((entry) => !entry.undone),
      place: looking ? `${this.back} back` : "",
    });
    this.showSaving();
  }

  look(step) {
    const next = Math.min(Math.max(this.back + step, 0), this.past.length);
    if (next === this.back) return;
    this.back = next;
    const item = next > 0 ? this.past[this.past.length - next].item : this.item;
    if (item) this.view.item(item);
    else this.view.nothing(this.unreachable, this.escalated);
    this.keys.itemShown();
    this.render();
  }

  // --- drafts -------------------------------------------------------------------------------------------------

  loadDraft(item) {
    const empty = { verdict: null, text: item.output, tags: [], comment: "", reason: null, activeMs: 0, key: crypto.randomUUID() };
    try {
      return { ...empty, ...JSON.parse(recall(`${this.prefix}:draft:${item.id}`) ?? "{}") };
    } catch {
      return empty; // an unreadable draft is no draft
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
    if (!this.draft || this.back > 0) return false;
    const { verdict, text, comment, reason } = this.draft;
    if (verdict === "correct") return text.trim() !== "" && text !== this.item.output;
    if (verdict === "skip") return Boolean(reason || comment.trim());
    if (verdict === "escalate") return comment.trim() !== "";
    return verdict !== null;
  }

  // --- actions ------------------------------------------------------------------------------------------------

  act(name) {
    const everywhere = {
      help: () => this.view.toggleHelp(), guidelines: () => this.view.toggleGuidelines(), undo: () => this.undo(),
      older: () => this.look(1), newer: () => this.look(-1), escape: () => this.view.escape(),
      tint: () => this.view.toggleTint(), diff: () => { this.letters = !this.letters; this.render(); },
    };
    if (everywhere[name]) return everywhere[name]();
    if (!this.item || this.back > 0) return undefined;
    if (name === "submit") return this.submit();
    if (name === "comment") return this.view.focusComment();
    if (name.startsWith("pick ")) return this.pick(Number(name.slice(5)));
    return this.choose(name === "edit" ? "correct" : name);
  }

  choose(verdict) {
    this.draft.verdict = verdict;
    this.keepDraft();
    this.render();
    if (verdict === "correct") this.view.focusEditor();
    if (verdict === "escalate") this.view.focusComment();
    return undefined;
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

  submit() {
    if (!this.ready()) {
      toast(this.missing());
      return;
    }
    const item = this.queue.shift();
    const draft = this.draft;
    const reason = draft.verdict === "skip" ? draft.reason : null;
    const comment = [reason, draft.comment.trim()].filter(Boolean).join(": ");
    const body = {
      verdict: draft.verdict, lease_token: item.lease_token, idempotency_key: draft.key, tags: draft.tags,
      active_ms: draft.activeMs + Math.min(999, Math.round(performance.now() - this.began) % 1000),
    };
    if (draft.verdict === "correct") body.correction = draft.text;
    if (comment) body.comment = comment;
    this.past.push({ item, draft, key: draft.key, annotationId: null, undone: false, reveal: null });
    this.outbox.add(item.id, body);
    remember(`${this.prefix}:draft:${item.id}`, null);
    this.show();
    this.fill();
  }

  missing() {
    const { verdict, text } = this.draft;
    if (verdict === "correct") return text.trim() ? "Nothing is changed yet. Accept it, or edit it." : "A correction cannot be empty.";
    if (verdict === "skip") return "Say why: press a number, or write a comment.";
    if (verdict === "escalate") return "Say in the comment what the lead should decide.";
    return "Choose a verdict first: a, e, x, k or f.";
  }

  stored(entry, answer) {
    const judged = this.past.find((one) => one.key === entry.body.idempotency_key);
    if (judged) {
      judged.annotationId = answer.id;
      judged.reveal = answer;
      this.view.reveal(answer);
      judged.whenStored?.();
    }
    this.refreshProgress();
    this.render();
    if (this.unreachable) this.fill();
  }

  refused(entry, error) {
    const judged = this.past.find((one) => one.key === entry.body.idempotency_key);
    if (judged) {
      judged.undone = true;
      remember(`${this.prefix}:draft:${entry.itemId}`, JSON.stringify({ ...judged.draft, key: crypto.randomUUID() }));
      judged.whenStored?.();
    }
    toast(`Not stored: ${error.message}.`, "bad");
    this.render();
    this.fill();
  }

  async undo() {
    const recent = this.past.slice(-UNDO_DEPTH);
    const looking = this.back > 0 ? this.past[this.past.length - this.back] : null;
    const entry = looking && !looking.undone ? looking : recent.findLast((one) => !one.undone && !one.undoing);
    if (!entry) {
      toast("There is nothing to undo.");
      return;
    }
    entry.undoing = true;
    try {
      await this.takeBack(entry);
    } catch (error) {
      toast(`Not undone: ${error.message}.`, "bad");
    }
    entry.undoing = false;
  }

  async takeBack(entry) {
    if (!this.outbox.takeBack(entry.key)) {
      if (!entry.annotationId && !entry.undone) await new Promise((resolve) => { entry.whenStored = resolve; });
      if (!entry.annotationId) return;
      const answer = await this.transport.undo(entry.annotationId);
      entry.item.lease_token = answer.lease_token;
      if (!answer.lease_token) toast("Undone. Another reviewer holds the item now.");
    }
    entry.undone = true;
    this.past = this.past.filter((one) => one !== entry);
    if (entry.item.lease_token) {
      remember(`${this.prefix}:draft:${entry.item.id}`, JSON.stringify({ ...entry.draft, key: crypto.randomUUID() }));
      this.queue = [entry.item, ...this.queue.filter((item) => item.id !== entry.item.id)];
    }
    this.view.reveal(null);
    this.show();
    this.refreshProgress();
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
    else if (this.draft && this.item && (this.draft.verdict || this.draft.text !== this.item.output || this.draft.comment)) {
      this.view.saving("draft", this.draftKept === false ? "Draft not kept: storage is off" : "Draft kept here");
    } else this.view.saving("", "Saved");
  }
}

new Review(document.querySelector("[data-review]")).start();
