// What the review page looks like in a given state. It decides nothing.

import { Answer } from "./answer.js";
import { Bar, told } from "./bar.js";
import { SKIP_REASONS } from "./draft.js";
import { conversation, element } from "./text.js";

const LABELS = {
  accept: "Accepted", correct: "Corrected", reject: "Rejected", prefer: "Compared", skip: "Skipped", escalate: "Escalated",
};
const NOTHING = {
  open: ["All caught up", "Nothing waits for you. New items arrive when the sampler closes its next time window; this page shows them at once."],
  escalated: ["Nothing is escalated", "When a reviewer asks for a second opinion, it lands here."],
  disputed: ["Nothing is disputed", "When reviewers of one answer disagree, a lead who was none of them decides here."],
};
const AWAY = ["The console cannot be reached", "Nothing is lost. This page asks again every few seconds."];
const AGAIN = "You have spoken of this one before. No other lead is left, so you may decide it; that is noted.";

export class View {
  constructor(root, act, edited) {
    this.at = (name) => root.querySelector(`[data-${name}]`) ?? document.querySelector(`[data-${name}]`);
    this.root = root;
    this.answer = new Answer(this.at, edited);
    this.bar = new Bar(this.at, root.dataset.slug);
    document.addEventListener("click", (event) => {
      const button = event.target.closest?.("[data-do], [data-verdict], [data-side], [data-pick]");
      if (!button) return;
      const { verdict, side, pick } = button.dataset;
      act(button.dataset.do ?? side ?? (pick ? `pick ${pick}` : verdict === "correct" ? "edit" : verdict));
    });
    this.at("comment").addEventListener("input", (event) => edited({ comment: event.target.value }));
  }

  // --- content ------------------------------------------------------------------------------------------------

  item(item) {
    this.#present(true);
    this.answer.item(item);
    this.at("conversation").replaceChildren(...conversation(item));
    this.root.querySelectorAll(".scroll").forEach((area) => { area.scrollTop = 0; });
    this.at("panes").classList.toggle("paired", Boolean(item.pair || item.dispute.length));
    this.at("panes").classList.toggle("deciding", Boolean(item.dispute.length || item.again));
    this.root.querySelectorAll("[data-for-pair]").forEach((part) => { part.hidden = !item.pair; });
    this.root.querySelectorAll("[data-for-single]").forEach((part) => { part.hidden = Boolean(item.pair); });
    const notes = [item.told && element("div", "note", told(item.told)), item.again && element("div", "note warn", AGAIN)];
    this.at("told").replaceChildren(...notes.filter(Boolean));
    this.at("told").hidden = !notes.some(Boolean);
  }

  nothing(unreachable, kind) {
    this.#present(false);
    const [title, text] = unreachable ? AWAY : NOTHING[kind];
    const area = this.at("empty-text");
    area.querySelector("h2").textContent = title;
    area.querySelector("p").textContent = text;
  }

  #present(some) {
    this.root.querySelectorAll("[data-when-item]").forEach((pane) => { pane.hidden = !some; });
    this.at("empty").hidden = some;
  }

  // --- state --------------------------------------------------------------------------------------------------

  render(state) {
    this.at("undo").disabled = !state.undoable;
    this.at("place").textContent = state.place;
    this.at("panes").classList.toggle("past", Boolean(state.past));
    if (!state.item || !state.draft) return;
    this.#verdict(state);
    this.at("submit").disabled = !state.ready;
    this.answer.render(state);
    this.#flags(state);
    this.#tags(state);
    this.#comment(state);
    this.#pastNote(state.past);
  }

  #verdict({ draft: { verdict, preference }, past }) {
    this.root.querySelectorAll("[data-verdict], [data-side]").forEach((button) => {
      const { side } = button.dataset;
      const chosen = side ? verdict === "prefer" && side === preference : button.dataset.verdict === verdict;
      button.setAttribute("aria-checked", String(chosen));
      button.disabled = Boolean(past);
    });
    for (const side of ["left", "right"]) {
      this.at(`side-${side}`).parentElement.classList.toggle("chosen", verdict === "prefer" && preference === side);
    }
    this.root.querySelectorAll("[data-answer-tools] button").forEach((button) => {
      if (button !== this.at("tint")) button.disabled = Boolean(past);
    });
  }

  #flags(state) {
    const { spans } = state.draft;
    this.at("flagging").hidden = !state.pending;
    this.at("flag-group").hidden = !spans.length;
    this.at("flags").replaceChildren(...spans.map((span, place) => {
      const line = element("li", "");
      line.append(element("q", "", state.item.output.slice(span.start, span.end)));
      if (span.tag) line.append(element("span", "muted", span.tag));
      if (!state.past) {
        const remove = element("button", "icon-btn", "×");
        remove.type = "button";
        remove.dataset.do = `unflag ${place}`;
        remove.setAttribute("aria-label", "Remove this flag");
        line.append(remove);
      }
      return line;
    }));
  }

  #tags(state) {
    const skipping = state.draft.verdict === "skip";
    const names = skipping ? SKIP_REASONS : state.tags;
    const chosen = skipping ? [state.draft.reason] : state.draft.tags;
    this.at("tag-group").hidden = !names.length;
    this.at("tag-label").textContent = skipping ? "Why skip it" : "Tags";
    const area = this.at("tags");
    const made = names.map((name, index) => {
      const tag = element("button", "tag");
      tag.type = "button";
      tag.disabled = Boolean(state.past);
      tag.setAttribute("aria-pressed", String(chosen.includes(name)));
      tag.dataset.pick = String(index + 1);
      if (index < 9) tag.append(element("kbd", "", String(index + 1)));
      tag.append(document.createTextNode(name));
      return tag;
    });
    const focused = [...area.children].indexOf(document.activeElement);
    area.replaceChildren(...made);
    if (focused >= 0) area.children[focused]?.focus();
  }

  #comment(state) {
    const comment = this.at("comment");
    const wanted = { skip: "Or in your own words", escalate: "What should the lead decide?" };
    const usual = state.item.dispute.length || state.item.again ? "Why do you decide so?" : "Comment";
    this.at("comment-label").textContent = wanted[state.draft.verdict] ?? usual;
    comment.disabled = Boolean(state.past);
    if (comment.value !== state.draft.comment) comment.value = state.draft.comment;
  }

  #pastNote(past) {
    const area = this.at("past");
    area.hidden = !past;
    if (past) this.at("told").hidden = true; // what was to be known before is told again, and more
    this.at("submit").parentElement.hidden = Boolean(past);
    if (!past) return;
    const keyOf = (action) => document.querySelector(`[data-key-of="${action}"]`).textContent;
    const revealed = past.reveal ? `${told(past.reveal)} ` : "";
    const text = `${LABELS[past.draft.verdict]}. ${revealed}Press ${keyOf("undo")} to undo it, ${keyOf("newer")} to go on.`;
    area.replaceChildren(element("div", "note", text));
  }

  // --- focus --------------------------------------------------------------------------------------------------

  focusPage() {
    document.activeElement?.blur?.();
  }

  focusEditor() {
    this.answer.focusEditor();
  }

  focusComment() {
    this.at("comment").focus();
  }

  showPending() {
    this.at("response").querySelector("mark.pending")?.scrollIntoView({ block: "nearest" });
  }

  escape() {
    if (!this.at("drawer").hidden) this.at("drawer").hidden = true;
    else document.activeElement?.blur?.();
  }

  toggleGuidelines() {
    const drawer = this.at("drawer");
    drawer.hidden = !drawer.hidden;
  }
}
