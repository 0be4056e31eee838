// Flagged spans. Here offsets are JavaScript's UTF-16 units; what is stored counts characters and quotes the text.

const LONGEST_QUOTE = 2000;

export function toCharacters(text, { start, end, tag }) {
  const quote = text.slice(start, end);
  const before = [...text.slice(0, start)].length;
  const span = { start: before, end: before + [...quote].length, quote };
  return tag ? { ...span, tag } : span;
}

export function fromCharacters(text, { start, end, tag }) {
  const units = [...text];
  const before = units.slice(0, start).join("").length;
  return { start: before, end: before + units.slice(start, end).join("").length, tag: tag ?? null };
}

// Spans do not overlap: a new one takes the place of those it touches.
export function withSpan(spans, span) {
  const apart = spans.filter((one) => one.end <= span.start || one.start >= span.end);
  return [...apart, span].sort((one, other) => one.start - other.start);
}

export function tooLong(span) {
  return span.end - span.start > LONGEST_QUOTE;
}

// What is selected inside an element, as offsets of its text, or null.
export function selectedIn(area) {
  const selection = getSelection();
  if (!selection.rangeCount || selection.isCollapsed) return null;
  const range = selection.getRangeAt(0);
  if (!area.contains(range.startContainer) || !area.contains(range.endContainer)) return null;
  const before = document.createRange();
  before.selectNodeContents(area);
  before.setEnd(range.startContainer, range.startOffset);
  const start = before.toString().length;
  const end = start + range.toString().length;
  return end > start ? { start, end } : null;
}

// Moves by words: `at` is the span marked now, `step` is 1 or -1, `stretch` moves the end only.
export function moved(text, at, step, stretch) {
  if (stretch) {
    const end = step > 0 ? wordFrom(text, at.end)?.end : lastWithin(text, at);
    return end > at.start ? { ...at, end } : at;
  }
  return (step > 0 ? wordFrom(text, at.end) : wordBefore(text, at.start)) ?? at;
}

// A word, or a sign where somebody wrote nothing but signs.
const WORD = /[\p{L}\p{N}\p{M}_'’-]+/gu;
const SIGN = /\S+/gu;

export function wordFrom(text, index) {
  for (const pattern of [WORD, SIGN]) {
    pattern.lastIndex = index;
    const found = pattern.exec(text);
    if (found) return { start: found.index, end: found.index + found[0].length };
  }
  return null;
}

function wordBefore(text, index) {
  const from = Math.max(0, index - LONGEST_QUOTE);
  const near = text.slice(from, index);
  const found = [...near.matchAll(WORD)].at(-1) ?? [...near.matchAll(SIGN)].at(-1);
  return found ? { start: from + found.index, end: from + found.index + found[0].length } : null;
}

// Where a span ends when its last word is given up.
function lastWithin(text, { start, end }) {
  const last = wordBefore(text, end);
  return last && wordBefore(text, last.start)?.end;
}
