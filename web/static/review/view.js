// What the review page looks like in a given state. It decides nothing.

import { conversation, difference, element, tinted } from "./text.js";

const LABELS = { accept: "Accepted", correct: "Corrected", reject: "Rejected", skip: "Skipped", escalate: "Escalated" };
const WHY = {
  negative_feedback: "negative feedback", low_confidence: "low confidence", schema_failure: "a schema failure",
  disagreement: "disagreement", novelty: "novelty", uniform: "the uniform audit",
};

export class View {
  constructor(root, act, edited) {
    this.at = (name) => root.querySelector(`[data-${name}]`) ?? document.querySelector(`[data-${name}]`);
    this.root = root;
    this.edited = edited;
    this.showTint = false;
    document.addEventListener("click", (event) => {
      const button = event.target.closest?.("[data-do], [data-verdict], [data-pick]");
      if (!button) return;
      act(button.dataset.do ?? (button.dataset.pick ? `pick ${button.dataset.pick}` : this.#verdictAction(button)));
    });
    this.at("editor").addEventListener("input", (event) => edited({ text: event.target.value }));
    this.at("comment").addEventListener("input", (event) => edited({ comment: event.target.value }));
  }

  #verdictAction(button) {
    return button.dataset.verdict === "correct" ? "edit" : button.dataset.verdict;
  }

  // --- content ------------------------------------------------------------------------------------------------

  item(item) {
    this.#present(true);
    this.current = item;
    this.at("conversation").replaceChildren(...conversation(item));
    this.at("conversation").scrollTop = 0;
    this.#response();
  }

  nothing(unreachable, escalated) {
    this.#present(false);
    this.current = null;
    const [title, text] = unreachable
      ? ["The console cannot be reached", "Nothing is lost. This page asks again every few seconds."]
      : escalated
        ? ["Nothing is escalated", "When a reviewer asks for a second opinion, it lands here."]
        : ["All caught up", "Nothing waits for you. New items arrive when the sampler closes its next time window; this page shows them at once."];
    const area = this.at("empty-text");
    area.querySelector("h2").textContent = title;
    area.querySelector("p").textContent = text;
  }

  #present(some) {
    this.root.querySelectorAll("[data-when-item]").forEach((pane) => { pane.hidden = !some; });
    this.at("empty").hidden = some;
  }

  #response() {
    const { output, tokens } = this.current;
    const area = this.at("response");
    if (this.showTint && tokens) area.replaceChildren(...tinted(tokens));
    else area.textContent = output || "(empty answer)";
    this.at("tint").disabled = !tokens;
    this.at("tint").title = tokens ? "" : "The tokens of this answer cannot be read with the tokenizer in use";
    this.at("tint").setAttribute("aria-pressed", String(this.showTint && Boolean(tokens)));
  }

  // --- state --------------------------------------------------------------------------------------------------

  render(state) {
    this.at("undo").disabled = !state.undoable;
    this.at("place").textContent = state.place;
    this.at("panes").classList.toggle("past", Boolean(state.past));
    if (!state.item || !state.draft) return;
    const { verdict } = state.draft;
    this.root.querySelectorAll("[data-verdict]").forEach((button) => {
      button.setAttribute("aria-checked", String(button.dataset.verdict === verdict));
      button.disabled = Boolean(state.past);
    });
    this.at("submit").disabled = !state.ready;
    this.#editor(state);
    this.#tags(state);
    this.#comment(state);
    this.#pastNote(state.past);
  }

  #editor(state) {
    const editing = state.draft.verdict === "correct" && !state.past;
    const changed = state.draft.text !== state.item.output && state.draft.verdict === "correct";
    const editor = this.at("editor");
    this.at("response").hidden = editing;
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
      if (index < 9) {
        tag.dataset.pick = String(index + 1);
        tag.append(element("kbd", "", String(index + 1)));
      }
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
    this.at("comment-label").textContent = wanted[state.draft.verdict] ?? "Comment";
    comment.disabled = Boolean(state.past);
    if (comment.value !== state.draft.comment) comment.value = state.draft.comment;
  }

  #pastNote(past) {
    const area = this.at("past");
    area.hidden = !past;
    this.at("submit").parentElement.hidden = Boolean(past);
    if (!past) return;
    const note = element("div", "note");
    const told = past.reveal ? `${this.#told(past.reveal)} ` : "";
    note.textContent = `${LABELS[past.draft.verdict]}. ${told}Press u to undo it, → to go on.`;
    area.replaceChildren(note);
  }

  #told(reveal) {
    return `Answered by ${reveal.adapter_digest ? reveal.adapter_digest.slice(0, 10) : "the base model"}; chosen for ${WHY[reveal.strategy] ?? reveal.strategy}.`;
  }

  // --- the bottom line ---------------------------------------------------------------------------------------

  reveal(answer) {
    const area = this.at("reveal");
    if (!answer) {
      area.replaceChildren();
      return;
    }
    const link = element("a", "", "See it");
    link.href = `/p/${this.root.dataset.slug}/interactions/${answer.interaction_id}`;
    link.target = "_blank";
    area.replaceChildren(document.createTextNode(`${this.#told(answer)} `), link);
  }

  progress(figures) {
    this.at("done").textContent = figures.done_today.toLocaleString("en");
    this.at("waiting").textContent = figures.waiting.toLocaleString("en") + (figures.capped ? "+" : "");
    const median = this.at("median");
    median.parentElement.hidden = figures.median_seconds === null;
    if (figures.median_seconds !== null) median.textContent = figures.median_seconds.toPrecision(2);
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

  escape() {
    if (!this.at("drawer").hidden) this.at("drawer").hidden = true;
    else document.activeElement?.blur?.();
  }

  toggleHelp() {
    this.at("help").showModal();
  }

  toggleGuidelines() {
    const drawer = this.at("drawer");
    drawer.hidden = !drawer.hidden;
  }

  toggleTint() {
    if (!this.current?.tokens) return;
    this.showTint = !this.showTint;
    this.#response();
  }
}
