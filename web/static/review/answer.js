// The middle of the page: the response, its editor, what an edit changes, and whether it keeps its schema.

import { Checker, TOO_SLOW } from "./checker.js";
import { cards } from "./dispute.js";
import { compared, difference, marked, readable, tinted } from "./text.js";

const SHOWN_AT_ONCE = 100000; // characters; a megabyte in one line would keep the browser busy for seconds at every key

export class Answer {
  constructor(at, edited) {
    this.at = at;
    this.showTint = false;
    this.showOwn = false; // in a pair: what only one of the answers says
    this.checker = new Checker((question, problems) => this.#showCheck(question, problems));
    at("editor").addEventListener("input", (event) => edited({ text: event.target.value }));
  }

  item(item) {
    this.current = item;
    this.drawn = null;
    this.whole = false;
    this.asked = null;
    this.at("check").hidden = true;
    this.at("tint").disabled = !item.tokens;
    this.at("tint").title = item.tokens ? "" : "The tokens of this answer cannot be read with the tokenizer in use";
  }

  render(state) {
    this.#response(state);
    this.#editor(state);
    this.#check(state);
    this.#dispute(state);
  }

  showWhole() {
    this.whole = true;
  }

  hideTint() {
    this.showTint = false;
  }

  toggleTint() {
    if (this.current?.tokens && !this.current.pair) this.showTint = !this.showTint;
  }

  toggleOwn() {
    this.showOwn = !this.showOwn;
  }

  focusEditor() {
    const editor = this.at("editor");
    editor.focus();
    editor.setSelectionRange(editor.value.length, editor.value.length);
  }

  // Drawn again only when it changes: a response may be a megabyte long, and this runs on every key.
  #response({ item, draft, pending }) {
    const tint = this.showTint && Boolean(item.tokens);
    this.at("tint").setAttribute("aria-pressed", String(tint));
    const wanted = JSON.stringify([item.id, tint, draft.spans, pending, this.whole, this.showOwn]);
    if (this.drawn === wanted) return;
    this.drawn = wanted;
    const longest = Math.max(...[item.output, ...(item.pair ?? [])].map((text) => text.length));
    const shown = (text) => (this.whole ? text : text.slice(0, SHOWN_AT_ONCE));
    this.at("more").hidden = this.whole || longest <= SHOWN_AT_ONCE;
    this.at("more").textContent = `Show all ${longest.toLocaleString("en")} characters`;
    if (item.pair) this.#sides(item.pair.map(shown));
    const area = this.at("response");
    this.at("legend").hidden = !tint;
    if (tint) area.replaceChildren(...tinted(item.tokens, draft.spans));
    else if (item.output) area.replaceChildren(...marked(shown(item.output), draft.spans, pending));
    else area.textContent = "(empty answer)";
    if (tint) this.at("legend-none").hidden = Boolean(area.querySelector(".tok-1, .tok-2, .tok-3"));
  }

  #sides(texts) {
    this.at("own").setAttribute("aria-pressed", String(this.showOwn));
    const sides = this.showOwn ? compared(...texts) : texts.map(readable);
    sides.forEach((nodes, side) => {
      this.at(["side-left", "side-right"][side]).replaceChildren(...(nodes.length ? nodes : ["(empty answer)"]));
    });
  }

  #editor(state) {
    const editing = state.draft.verdict === "correct" && !state.past;
    const changed = state.draft.text !== state.item.output && state.draft.verdict === "correct";
    const editor = this.at("editor");
    this.at("response").hidden = editing || Boolean(state.item.pair);
    if (editing) this.at("legend").hidden = true;
    editor.hidden = !editing;
    this.at("editor-hint").hidden = !editing;
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

  // Whether the text as it would be kept still follows its schema. The answer comes a moment later, from the worker.
  #check({ item, draft }) {
    const corrected = draft.verdict === "correct";
    const text = corrected ? draft.text : item.output;
    const asked = item.pair || (item.schema === null && !corrected) ? null : text;
    if (asked === this.asked) return;
    this.asked = asked;
    if (asked === null) this.at("check").hidden = true;
    else this.checker.ask({ id: item.id, text, schema: item.schema, original: item.output });
  }

  #showCheck({ id, text, schema }, problems) {
    if (id !== this.current?.id || text !== this.asked) return;
    const area = this.at("check");
    area.hidden = problems === null;
    if (problems === null) return;
    const fine = schema === null ? "Valid JSON" : "Follows its schema";
    const kind = problems.length === 0 ? "ok" : problems[0] === TOO_SLOW ? "warn" : "bad";
    area.className = `schema-check ${kind}`;
    area.textContent = problems.join("; ") || fine;
  }

  #dispute({ item, draft, letters }) {
    const area = this.at("dispute");
    area.hidden = !item.dispute.length;
    if (item.dispute.length && !area.contains(document.activeElement)) area.replaceChildren(...cards(item, draft, letters));
  }
}
