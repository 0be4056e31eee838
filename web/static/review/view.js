// What the review page looks like in a given state. It decides nothing.

import { cards } from "./dispute.js";
import { problemsOf } from "./schema.js";
import { conversation, difference, element, marked, readable, tinted } from "./text.js";

const LABELS = {
  accept: "Accepted", correct: "Corrected", reject: "Rejected", prefer: "Compared", skip: "Skipped", escalate: "Escalated",
};
const WHY = {
  negative_feedback: "negative feedback", low_confidence: "low confidence", schema_failure: "a schema failure",
  disagreement: "disagreement", novelty: "novelty", uniform: "the uniform audit",
};
const NOTHING = {
  open: ["All caught up", "Nothing waits for you. New items arrive when the sampler closes its next time window; this page shows them at once."],
  escalated: ["Nothing is escalated", "When a reviewer asks for a second opinion, it lands here."],
  disputed: ["Nothing is disputed", "When reviewers of one answer disagree, a lead who was none of them decides here."],
};
const SHOWN_AT_ONCE = 100000; // characters; a megabyte in one line would keep the browser busy for seconds at every key
const AWAY = ["The console cannot be reached", "Nothing is lost. This page asks again every few seconds."];

export class View {
  constructor(root, act, edited) {
    this.at = (name) => root.querySelector(`[data-${name}]`) ?? document.querySelector(`[data-${name}]`);
    this.root = root;
    this.showTint = false;
    document.addEventListener("click", (event) => {
      const button = event.target.closest?.("[data-do], [data-verdict], [data-side], [data-pick]");
      if (!button) return;
      const { verdict, side, pick } = button.dataset;
      act(button.dataset.do ?? side ?? (pick ? `pick ${pick}` : verdict === "correct" ? "edit" : verdict));
    });
    this.at("editor").addEventListener("input", (event) => edited({ text: event.target.value }));
    this.at("comment").addEventListener("input", (event) => edited({ comment: event.target.value }));
  }

  // --- content ------------------------------------------------------------------------------------------------

  item(item) {
    this.#present(true);
    this.current = item;
    this.drawn = null;
    this.whole = false;
    this.at("conversation").replaceChildren(...conversation(item));
    this.root.querySelectorAll(".scroll").forEach((area) => { area.scrollTop = 0; });
    this.at("panes").classList.toggle("paired", Boolean(item.pair || item.dispute.length));
    this.root.querySelectorAll("[data-for-pair]").forEach((part) => { part.hidden = !item.pair; });
    this.root.querySelectorAll("[data-for-single]").forEach((part) => { part.hidden = Boolean(item.pair); });
    this.at("tint").disabled = !item.tokens;
    this.at("tint").title = item.tokens ? "" : "The tokens of this answer cannot be read with the tokenizer in use";
    this.at("told").hidden = !item.told;
    if (item.told) this.at("told").replaceChildren(element("div", "note", this.#told(item.told)));
  }

  nothing(unreachable, kind) {
    this.#present(false);
    this.current = null;
    const [title, text] = unreachable ? AWAY : NOTHING[kind];
    const area = this.at("empty-text");
    area.querySelector("h2").textContent = title;
    area.querySelector("p").textContent = text;
  }

  #present(some) {
    this.root.querySelectorAll("[data-when-item]").forEach((pane) => { pane.hidden = !some; });
    this.at("empty").hidden = some;
  }

  // Drawn again only when it changes: a response may be a megabyte long, and this runs on every key.
  #response({ item, draft, pending }) {
    const tint = this.showTint && Boolean(item.tokens);
    this.at("tint").setAttribute("aria-pressed", String(tint));
    const wanted = JSON.stringify([item.id, tint, draft.spans, pending, this.whole]);
    if (this.drawn === wanted) return;
    this.drawn = wanted;
    const longest = Math.max(...[item.output, ...(item.pair ?? [])].map((text) => text.length));
    const shown = (text) => (this.whole ? text : text.slice(0, SHOWN_AT_ONCE));
    this.at("more").hidden = this.whole || longest <= SHOWN_AT_ONCE;
    this.at("more").textContent = `Show all ${longest.toLocaleString("en")} characters`;
    (item.pair ?? []).forEach((text, side) => {
      this.at(["side-left", "side-right"][side]).replaceChildren(...(text ? readable(shown(text)) : ["(empty answer)"]));
    });
    const area = this.at("response");
    if (tint) area.replaceChildren(...tinted(item.tokens));
    else if (item.output) area.replaceChildren(...marked(shown(item.output), draft.spans, pending));
    else area.textContent = "(empty answer)";
  }

  // --- state --------------------------------------------------------------------------------------------------

  render(state) {
    this.at("undo").disabled = !state.undoable;
    this.at("place").textContent = state.place;
    this.at("panes").classList.toggle("past", Boolean(state.past));
    if (!state.item || !state.draft) return;
    const { verdict, preference } = state.draft;
    this.root.querySelectorAll("[data-verdict], [data-side]").forEach((button) => {
      const chosen = button.dataset.side ? verdict === "prefer" && button.dataset.side === preference : button.dataset.verdict === verdict;
      button.setAttribute("aria-checked", String(chosen));
      button.disabled = Boolean(state.past);
    });
    for (const side of ["left", "right"]) {
      this.at(`side-${side}`).parentElement.classList.toggle("chosen", verdict === "prefer" && preference === side);
    }
    this.at("submit").disabled = !state.ready;
    this.#response(state);
    this.#editor(state);
    this.#check(state);
    this.#dispute(state);
    this.#flags(state);
    this.#tags(state);
    this.#comment(state);
    this.#pastNote(state.past);
  }

  #editor(state) {
    const editing = state.draft.verdict === "correct" && !state.past;
    const changed = state.draft.text !== state.item.output && state.draft.verdict === "correct";
    const editor = this.at("editor");
    this.at("response").hidden = editing || Boolean(state.item.pair);
    editor.hidden = !editing;
    if (editing && editor.value !== state.draft.text) editor.value = state.draft.text;
    if (editing) this.#grow(editor);
    this.at("change").hidden = !changed;
    if (!changed) return;
    const { nodes, share } = difference(state.item.output, state.draft.text, state.letters);
    this.at("diff").replaceChildren(...nodes);
    this.at("change-share").textContent = `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} % changed`;
    this.at("diff-mode").firstChild.textContent = state.letters ? "by letters " : "by words ";
  }

  #grow(editor) {
    if (CSS.supports("field-sizing", "content")) return;
    editor.style.height = "auto";
    editor.style.height = `${editor.scrollHeight + 2}px`;
  }

  // Whether the text as it would be kept still follows its schema.
  #check({ item, draft }) {
    const area = this.at("check");
    const problems = item.pair ? null : this.#problems(item, draft.verdict === "correct" ? draft.text : item.output);
    const silent = problems === null || (item.schema === null && draft.verdict !== "correct");
    area.hidden = silent;
    if (silent) return;
    area.className = problems.length ? "check bad" : "check ok";
    area.textContent = problems.length ? problems.join("; ") : item.schema === null ? "Valid JSON" : "Follows its schema";
  }

  #problems(item, text) {
    if (this.checked?.id !== item.id || this.checked.text !== text) {
      this.checked = { id: item.id, text, problems: problemsOf(text, item.schema, item.output) };
    }
    return this.checked.problems;
  }

  #dispute({ item, draft, letters }) {
    const area = this.at("dispute");
    area.hidden = !item.dispute.length;
    if (item.dispute.length && !area.contains(document.activeElement)) area.replaceChildren(...cards(item, draft, letters));
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
    const names = skipping ? state.reasons : state.tags;
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
    const usual = state.item.dispute.length ? "Why do you decide so?" : "Comment";
    this.at("comment-label").textContent = wanted[state.draft.verdict] ?? usual;
    comment.disabled = Boolean(state.past);
    if (comment.value !== state.draft.comment) comment.value = state.draft.comment;
  }

  #pastNote(past) {
    const area = this.at("past");
    area.hidden = !past;
    this.at("submit").parentElement.hidden = Boolean(past);
    if (!past) return;
    const keyOf = (action) => document.querySelector(`[data-key-of="${action}"]`).textContent;
    const told = past.reveal ? `${this.#told(past.reveal)} ` : "";
    const text = `${LABELS[past.draft.verdict]}. ${told}Press ${keyOf("undo")} to undo it, ${keyOf("newer")} to go on.`;
    area.replaceChildren(element("div", "note", text));
  }

  #told(reveal) {
    return `Answered by ${reveal.adapter_digest ? reveal.adapter_digest.slice(0, 10) : "the base model"}; chosen for ${WHY[reveal.strategy] ?? reveal.strategy}.`;
  }

  // --- the bottom line ---------------------------------------------------------------------------------------

  reveal(judged) {
    const area = this.at("reveal");
    if (!judged) {
      area.replaceChildren();
      return;
    }
    const answer = judged.reveal;
    const link = element("a", "", "See it");
    link.href = `/p/${this.root.dataset.slug}/interactions/${answer.interaction_id}`;
    link.target = "_blank";
    area.replaceChildren(document.createTextNode(`${this.#told(answer)} `), link);
    if (answer.adjudicates) {
      const gold = element("button", "btn small quiet", "Check reviewers by it");
      gold.type = "button";
      gold.dataset.do = "gold";
      gold.title = "Show it, unmarked, to reviewers who have not seen it, and count how often they are right";
      area.append(" ", gold);
    }
  }

  progress(figures) {
    this.at("done").textContent = figures.done_today.toLocaleString("en");
    this.at("waiting").textContent = figures.waiting.toLocaleString("en") + (figures.capped ? "+" : "");
    const median = this.at("median");
    median.parentElement.hidden = figures.median_seconds === null;
    if (figures.median_seconds !== null) median.textContent = figures.median_seconds.toPrecision(2);
    for (const queue of ["escalated", "disputed"]) {
      const badge = document.querySelector(`[data-count="${queue}"]`);
      if (badge) badge.textContent = figures[queue] ? String(figures[queue]) : "";
    }
  }

  saving(kind, text) {
    const area = this.at("save");
    if (area.textContent !== text) area.textContent = text;
    area.className = `save ${kind}`;
  }

  // --- focus --------------------------------------------------------------------------------------------------

  focusPage() {
    document.activeElement?.blur?.();
  }

  focusEditor() {
    const editor = this.at("editor");
    editor.focus();
    editor.setSelectionRange(editor.value.length, editor.value.length);
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

  showWhole() {
    this.whole = true;
  }

  hideTint() {
    this.showTint = false;
  }

  toggleTint() {
    if (!this.current?.tokens || this.current.pair) return;
    this.showTint = !this.showTint;
  }
}
