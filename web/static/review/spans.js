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
    const end = step > 0 ? wordFrom(text, at.end)?.end : wordBefore(text, at.end)?.start;
    return end !== undefined && end > at.start ? { ...at, end: trimmed(text, at.start, end) } : at;
  }
  return (step > 0 ? wordFrom(text, at.end) : wordBefore(text, at.start)) ?? at;
}

export function wordFrom(text, index) {
  const word = /\S+/gu;
  word.lastIndex = index;
  const found = word.exec(text);
  return found ? { start: found.index, end: found.index + found[0].length } : null;
}

function wordBefore(text, index) {
  const end = text.slice(0, index).trimEnd().length;
  if (end === 0) return null;
  const start = end - text.slice(Math.max(0, end - LONGEST_QUOTE), end).match(/\S+$/u)[0].length;
  return { start, end };
}

function trimmed(text, start, end) {
  return start + text.slice(start, end).trimEnd().length;
}
