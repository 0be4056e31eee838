// Untrusted text to elements. Only textContent is ever set: model output cannot become markup.

export function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

// Characters that show nothing or turn the reading direction: a text that holds them does not say what it seems to.
const UNSEEN = /[\u00ad\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufeff\uffa0]+/g;
const MOST_MARKED = 500;

// The text as nodes, with what cannot be seen marked. Each mark isolates what is in it, so that it turns nothing else.
export function readable(text) {
  const nodes = [];
  let from = 0;
  for (const found of text.matchAll(UNSEEN)) {
    if (nodes.length > 2 * MOST_MARKED) break;
    if (found.index > from) nodes.push(document.createTextNode(text.slice(from, found.index)));
    const mark = element("span", "unseen", found[0]);
    const codes = [...found[0]].slice(0, 3).map((one) => one.codePointAt(0).toString(16).toUpperCase().padStart(4, "0"));
    mark.dataset.code = found[0].length > 3 ? `${codes.join(" ")} …×${found[0].length}` : codes.join(" ");
    nodes.push(mark);
    from = found.index + found[0].length;
  }
  // More marks would only slow the page down; what is left turns nothing either, and every character keeps its place.
  const rest = nodes.length > 2 * MOST_MARKED ? text.slice(from).replace(UNSEEN, (run) => "\ufffd".repeat(run.length)) : text.slice(from);
  if (rest) nodes.push(document.createTextNode(rest));
  return nodes;
}

// The text with its spans as marks; `pending` is the one being chosen.
export function marked(text, spans, pending) {
  const apart = pending ? spans.filter((one) => one.end <= pending.start || one.start >= pending.end) : spans;
  const shown = pending ? [...apart, { ...pending, pending: true }].sort((one, two) => one.start - two.start) : spans;
  const nodes = [];
  let from = 0;
  for (const span of shown) {
    const start = Math.max(span.start, from);
    if (span.end <= start) continue; // overlaps come only from other clients
    nodes.push(...readable(text.slice(from, start)));
    const mark = element("mark", span.pending ? "pending" : "");
    mark.append(...readable(text.slice(start, span.end)));
    if (span.tag) mark.dataset.tag = span.tag;
    nodes.push(mark);
    from = span.end;
  }
  nodes.push(...readable(text.slice(from)));
  return nodes;
}

export function contentText(content) {
  if (typeof content === "string") return content;
  if (content === null || content === undefined) return "";
  if (Array.isArray(content) && content.every((part) => typeof part?.text === "string")) {
    return content.map((part) => part.text).join("\n");
  }
  return JSON.stringify(content, null, 2);
}

function turn(message) {
  const role = ["user", "system"].includes(message.role) ? message.role : "assistant";
  const made = element("div", `turn ${role}`);
  made.append(element("span", "turn-role", String(message.role ?? "message")));
  const text = contentText(message.content);
  const body = element("div", "turn-text");
  body.append(...readable(text));
  if ((role === "system" && text.length > 280) || text.length > 4000) {
    made.append(folded(`${text.slice(0, 90)}… (${text.length.toLocaleString("en")} characters)`, body));
  } else made.append(body);
  return made;
}

function folded(summary, ...content) {
  const made = element("details", "fold");
  made.append(element("summary", "", summary), ...content);
  return made;
}

export function conversation(item) {
  const made = element("div", "turns");
  for (const message of item.messages) made.append(turn(message));
  for (const [name, list] of [["retrieved passages", item.retrieved], ["tools", item.tools]]) {
    if (list?.length) made.append(folded(`${list.length} ${name}`, element("pre", "text small", JSON.stringify(list, null, 2))));
  }
  for (const earlier of item.history ?? []) {
    made.append(element("div", "note warn", `Escalated: ${earlier.comment || "no reason was given"}`));
  }
  return [made];
}

// Each token by its probability; those in a flagged span keep its line.
export function tinted(tokens, spans) {
  let from = 0;
  return tokens.map(([text, logprob]) => {
    const tint = logprob < -2.3 ? "tok-3" : logprob < -1.2 ? "tok-2" : logprob < -0.5 ? "tok-1" : "";
    const to = from + text.length;
    const flagged = spans.some((span) => span.start < to && span.end > from) ? "flagged" : "";
    from = to;
    const made = element("span", `tok ${tint} ${flagged}`);
    made.append(...readable(text));
    made.title = `${(100 * Math.exp(logprob)).toFixed(1)} %`;
    return made;
  });
}

const SLOWEST_DIFF_MS = 120;

// Two answers as elements, what only one of them says marked. No colour of right or wrong: neither is the first.
export function compared(left, right) {
  const parts = Diff.diffWordsWithSpace(left, right, { timeout: SLOWEST_DIFF_MS });
  if (!parts) return [readable(left), readable(right)];
  const sides = [[], []];
  for (const part of parts) {
    if (!part.added) sides[0].push(...(part.removed ? [own(part.value)] : readable(part.value)));
    if (!part.removed) sides[1].push(...(part.added ? [own(part.value)] : readable(part.value)));
  }
  return sides;
}

function own(text) {
  const made = element("mark", "own");
  made.append(...readable(text));
  return made;
}

// The difference as elements, and the share of characters that changed.
export function difference(before, after, letters) {
  const compare = letters ? Diff.diffChars : Diff.diffWordsWithSpace;
  const parts = compare(before, after, { timeout: SLOWEST_DIFF_MS })
    ?? [{ removed: true, value: before }, { added: true, value: after }];
  let changed = 0;
  const made = parts.flatMap((part) => {
    if (!part.added && !part.removed) return readable(part.value);
    changed += part.value.length;
    const piece = element(part.added ? "ins" : "del", "");
    piece.append(...readable(part.value));
    return [piece];
  });
  return { nodes: made, share: changed / Math.max(1, before.length + after.length) };
}
