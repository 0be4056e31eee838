// Untrusted text to elements. Only textContent is ever set: model output cannot become markup.

export function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
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
  const body = element("div", "turn-text", text);
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

export function tinted(tokens) {
  return tokens.map(([text, logprob]) => {
    const tint = logprob < -2.3 ? "tok-3" : logprob < -1.2 ? "tok-2" : logprob < -0.5 ? "tok-1" : "";
    const made = element("span", `tok ${tint}`, text);
    made.title = `${(100 * Math.exp(logprob)).toFixed(1)} %`;
    return made;
  });
}

const SLOWEST_DIFF_MS = 120;

// The difference as elements, and the share of characters that changed.
export function difference(before, after, letters) {
  const compare = letters ? Diff.diffChars : Diff.diffWordsWithSpace;
  const parts = compare(before, after, { timeout: SLOWEST_DIFF_MS })
    ?? [{ removed: true, value: before }, { added: true, value: after }];
  let changed = 0;
  const made = parts.map((part) => {
    if (!part.added && !part.removed) return document.createTextNode(part.value);
    changed += part.value.length;
    return element(part.added ? "ins" : "del", "", part.value);
  });
  return { nodes: made, share: changed / Math.max(1, before.length + after.length) };
}
