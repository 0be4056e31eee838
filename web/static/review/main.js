// The review page: which item is in front of the reviewer, what they have decided, and where it goes.

import { recall, remember, toast } from "../app.js";
import { emptyDraft, missing, toBody, touched } from "./draft.js";
import { Judging } from "./judging.js";
import { KeyDialog } from "./keydialog.js";
import { Keys } from "./keys.js";
import { Outbox } from "./outbox.js";
import { Past } from "./past.js";
import { Supply } from "./supply.js";
import { Transport } from "./transport.js";
import { View } from "./view.js";

const PAUSE_MS = 30000; // longer silences are not counted as attention
const PROGRESS_MS = 1000;

class Review {
  constructor(root) {
    const { slug, user, queue: kind } = root.dataset;
    this.kind = kind;
    this.transport = new Transport(slug);
    this.prefix = `whet:${slug}:${user}`;
    this.draft = null;
    this.letters = false;
    this.view = new View(root, (name) => this.act(name), (change) => this.edited(change));
    this.judging = new Judging(this, this.view);
    this.#listen(JSON.parse(root.dataset.keys));
    this.outbox = new Outbox(`${this.prefix}:outbox`, this.transport, {
      stored: (entry, answer) => this.stored(entry, answer),
      refused: (entry, error) => this.refused(entry, error),
      changed: () => this.showSaving(),
    });
    this.supply = new Supply(this.transport, kind, {
      leaving: () => new Set(this.outbox.entries.map((entry) => entry.itemId)),
      lost: () => toast("This item went to another reviewer; what you wrote is still in the draft.", "bad"),
      filled: (another) => (another ? this.show() : this.showSaving()),
    });
    this.past = new Past(this.transport, this.outbox, kind, {
      returned: (entry) => this.returned(entry), changed: () => this.render(), say: toast,
    });
  }

  #listen(keyOf) {
    this.keys = new Keys((name) => this.act(name), keyOf);
    this.keys.capture = (event) => this.judging.flagging.name(event);
    this.keyDialog = new KeyDialog(this.view.at("help"), keyOf, {
      save: (keys) => this.transport.chooseKeys(keys),
      changed: (keys) => this.keys.use(keys),
    });
  }

  async start() {
    setInterval(() => this.countAttention(), 1000);
    this.outbox.resume();
    await this.supply.start();
    this.past.remember();
  }

  get item() {
    return this.supply.item;
  }

  get tags() {
    return this.supply.tags;
  }

  countAttention() {
    const here = !document.hidden && this.supply.silence < PAUSE_MS;
    if (here && this.draft && this.past.back === 0) this.draft.activeMs += 1000;
  }

  // --- what is shown -----------------------------------------------------------------------------------------

  show() {
    this.past.back = 0;
    this.draft = this.item ? this.loadDraft(this.item) : null;
    this.began = performance.now();
    this.#bring(this.item);
    if (this.item) this.view.focusPage();
    this.render();
  }

  look(step) {
    if (!this.past.look(step)) return;
    this.#bring(this.past.looking?.item ?? this.item);
    this.render();
  }

  // Another item comes into view, or none.
  #bring(item) {
    this.judging.flagging.leave();
    this.keys.itemShown();
    if (item) this.view.item(item);
    else this.view.nothing(this.supply.unreachable, this.kind);
  }

  render() {
    const { looking, back, entries } = this.past;
    this.view.render({
      item: looking?.item ?? this.item,
      draft: looking?.draft ?? this.draft,
      past: looking,
      tags: this.tags,
      letters: this.letters,
      pending: this.judging.flagging.at,
      ready: Boolean(this.draft) && back === 0 && !missing(this.item, this.draft),
      undoable: entries.length > 0,
      place: looking ? `${back} back` : "",
    });
    this.showSaving();
  }

  // --- drafts -------------------------------------------------------------------------------------------------

  loadDraft(item) {
    try {
      return { ...emptyDraft(item), ...JSON.parse(recall(`${this.prefix}:draft:${item.id}`) ?? "{}") };
    } catch {
      return emptyDraft(item); // an unreadable draft is no draft
    }
  }

  edited(change) {
    if (!this.draft || this.past.back > 0) return;
    Object.assign(this.draft, change);
    if ("text" in change && !("verdict" in change)) this.#judgeByText();
    this.draftKept = remember(`${this.prefix}:draft:${this.item.id}`, JSON.stringify(this.draft));
    this.render();
  }

  // Typing is correcting, and typing it all back is not.
  #judgeByText() {
    if (this.draft.text !== this.item.output) this.draft.verdict = "correct";
    else if (this.draft.verdict === "correct") this.draft.verdict = null;
  }

  #keepForLater(entry) {
    const draft = { ...entry.draft, key: crypto.randomUUID() };
    remember(`${this.prefix}:draft:${entry.item.id}`, JSON.stringify(draft));
  }

  // --- actions ------------------------------------------------------------------------------------------------

  act(name) {
    const everywhere = {
      help: () => this.keyDialog.open(), guidelines: () => this.view.toggleGuidelines(), undo: () => this.past.undo(),
      older: () => this.look(1), newer: () => this.look(-1), escape: () => this.view.escape(), gold: () => this.gold(),
      more: () => { this.view.answer.showWhole(); this.render(); },
      tint: () => { this.view.answer.toggleTint(); this.render(); }, diff: () => this.changeDifference(),
    };
    if (everywhere[name]) everywhere[name]();
    else if (!this.item || this.past.back > 0) return;
    else if (name === "submit") this.submit();
    else this.judging.act(name);
  }

  // Of an edit: by words or letters. Of a pair: shown or not.
  changeDifference() {
    const item = this.past.looking?.item ?? this.item;
    if (item?.pair) this.view.answer.toggleOwn();
    else this.letters = !this.letters;
    this.render();
  }

  submit() {
    const lacking = missing(this.item, this.draft);
    if (lacking) {
      toast(lacking);
      return;
    }
    const { draft } = this;
    const item = this.supply.take();
    draft.activeMs += Math.min(999, Math.round(performance.now() - this.began) % 1000);
    this.past.add(item, draft);
    this.outbox.add(item.id, toBody(item, draft));
    remember(`${this.prefix}:draft:${item.id}`, null);
    this.show();
    this.supply.topUp();
  }

  stored(entry, answer) {
    const judged = this.past.sent(entry.body);
    if (judged) {
      this.revealed = judged;
      this.past.stored(judged, answer);
      this.view.bar.reveal(judged);
    }
    this.refreshProgress();
    this.render();
    if (this.supply.unreachable) this.supply.fill();
  }

  refused(entry, error) {
    const judged = this.past.sent(entry.body);
    if (judged) {
      const looked = this.past.back > 0;
      this.#keepForLater(judged);
      this.past.refused(judged);
      if (looked) this.#bring(this.item);
    }
    toast(`Not stored: ${error.message}.`, "bad");
    this.render();
    this.supply.fill();
  }

  // A judgement was undone: what it said is a draft again.
  returned(entry) {
    if (entry.item.lease_token) this.#keepForLater(entry);
    this.supply.putBack(entry.item);
    this.revealed = null;
    this.view.bar.reveal(null);
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

  // At once, but not for each of many judgements in a second.
  refreshProgress() {
    if (this.progressDue) return;
    const since = Date.now() - (this.progressAt ?? 0);
    this.progressDue = setTimeout(() => this.#readProgress(), Math.max(0, PROGRESS_MS - since));
  }

  async #readProgress() {
    this.progressDue = null;
    this.progressAt = Date.now();
    try {
      this.view.bar.progress(await this.transport.progress());
    } catch {
      // Figures may be old for a moment; the next judgement brings them.
    }
  }

  showSaving() {
    const waiting = this.outbox.size;
    if (this.outbox.offline) this.view.bar.saving("offline", `Offline: ${waiting} kept here, trying again`);
    else if (waiting) this.view.bar.saving("busy", "Saving");
    else if (this.supply.unreachable) this.view.bar.saving("offline", "Offline: trying again");
    else if (this.draft && this.item && touched(this.item, this.draft)) {
      this.view.bar.saving("draft", this.draftKept === false ? "Draft not kept: storage is off" : "Draft kept here");
    } else this.view.bar.saving("", "Saved");
  }
}

new Review(document.querySelector("[data-review]")).start();
