// What keys and buttons do to the judgement of the item in view. `desk` has the item, its draft, the project's tags, and
// is told of every change by `edited`.

import { toast } from "../app.js";
import { SKIP_REASONS, draftOf } from "./draft.js";
import { Flagging } from "./flagging.js";
import { tooLong, withSpan } from "./spans.js";

export class Judging {
  constructor(desk, view) {
    this.desk = desk;
    this.view = view;
    this.flagging = new Flagging(view.at("response"));
  }

  act(name) {
    const [word, detail, number] = name.split(" ");
    const { draft } = this.desk;
    if (word === "pick") this.#pick(Number(detail));
    else if (word === "span") this.#flag(detail, Number(number));
    else if (word === "unflag") this.desk.edited({ spans: draft.spans.filter((_, place) => place !== Number(detail)) });
    else if (word === "adopt") this.#takeOver(Number(detail));
    else if (["left", "right", "tie"].includes(name)) this.#side(name);
    else if (name === "comment") this.view.focusComment();
    else this.#choose(name === "edit" ? "correct" : name);
  }

  #choose(verdict) {
    if (this.desk.item.pair && ["accept", "correct"].includes(verdict)) return;
    this.flagging.leave();
    this.desk.edited({ verdict, preference: null });
    if (verdict === "correct") this.view.focusEditor();
    if (verdict === "escalate") this.view.focusComment();
  }

  // [ ] = choose in a pair; where judges disagree they take over what one of them said.
  #side(name) {
    const { item } = this.desk;
    if (item.dispute.length && name !== "tie") this.#takeOver(name === "left" ? 0 : 1);
    else if (item.pair) this.desk.edited({ verdict: "prefer", preference: name });
  }

  #takeOver(place) {
    const said = this.desk.item.dispute[place];
    if (!said) return;
    const { verdict, text, preference, tags, spans } = draftOf(this.desk.item, said);
    this.desk.edited({ text, verdict, preference, tags, spans });
    this.view.focusComment();
  }

  #pick(number) {
    const { draft, tags } = this.desk;
    if (draft.verdict === "skip") {
      const reason = SKIP_REASONS[number - 1];
      if (reason) this.desk.edited({ reason: draft.reason === reason ? null : reason });
      return;
    }
    const tag = tags[number - 1];
    if (!tag) return;
    const others = draft.tags.filter((other) => other !== tag);
    this.desk.edited({ tags: others.length < draft.tags.length ? others : [...draft.tags, tag] });
  }

  // --- spans --------------------------------------------------------------------------------------------------

  #flag(how, number) {
    const text = this.desk.item.output;
    if (how === undefined) this.#beginFlag(text);
    else if (how === "leave") this.flagging.leave();
    else if (how === "move" || how === "stretch") this.flagging.move(text, number, how === "stretch");
    else if (this.flagging.at) this.#keepFlag(how === "tag" ? this.desk.tags[number - 1] : null);
    this.desk.render();
    if (this.flagging.at) this.view.showPending();
  }

  #beginFlag(text) {
    const { item, draft } = this.desk;
    if (item.pair) toast("Spans are flagged in single responses.");
    else if (draft.verdict === "correct") toast("Flag spans before you edit; another verdict leaves the editor.");
    else if (!this.flagging.begin(text)) toast("There is nothing to flag.");
    else this.view.answer.hideTint();
  }

  // `tag` is null for an untagged flag, undefined for a number without a tag.
  #keepFlag(tag) {
    if (tag === undefined) return;
    const span = { ...this.flagging.at, tag };
    this.flagging.leave();
    if (tooLong(span)) toast("A flagged span is at most 2,000 characters long.");
    else this.desk.edited({ spans: withSpan(this.desk.draft.spans, span) });
  }
}
