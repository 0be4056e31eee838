// What a reviewer has said about an item so far, and whether it says enough to be sent.

import { fromCharacters, toCharacters } from "./spans.js";

export const SKIP_REASONS = ["unclear", "needs an expert", "broken text", "not my language"];

export function emptyDraft(item) {
  return {
    verdict: null, text: item.output, preference: null, tags: [], spans: [], comment: "", reason: null, activeMs: 0,
    key: crypto.randomUUID(),
  };
}

// A stored judgement as the draft it came from.
export function draftOf(item, judgement) {
  return {
    ...emptyDraft(item),
    verdict: judgement.verdict,
    text: judgement.correction ?? item.output,
    preference: judgement.preference,
    tags: judgement.tags ?? [],
    spans: (judgement.spans ?? []).map((span) => fromCharacters(item.output, span)),
    comment: judgement.comment ?? "",
  };
}

export function missing(item, draft) {
  const { verdict, text, reason } = draft;
  const comment = draft.comment.trim();
  if (verdict === null) {
    return item.pair ? "Choose a side first: left, right, equal, or neither." : "Choose a verdict first.";
  }
  if (verdict === "correct" && !text.trim()) return "A correction cannot be empty.";
  if (verdict === "correct" && text === item.output) return "Nothing is changed yet. Accept it, or edit it.";
  if (verdict === "skip") return reason || comment ? "" : "Say why: press a number, or write a comment.";
  if (verdict === "escalate" && item.again) return "This one is yours to decide; skip it to leave it.";
  if (verdict === "escalate") return comment ? "" : "Say in the comment what the lead should decide.";
  if ((item.dispute.length || item.again) && !comment) return "Say in the comment why you decide so.";
  return "";
}

export function touched(item, draft) {
  return Boolean(draft.verdict || draft.comment || draft.spans.length || draft.tags.length || draft.text !== item.output);
}

// The request, without the milliseconds since the last whole second of attention.
export function toBody(item, draft) {
  const reason = draft.verdict === "skip" ? draft.reason : null;
  const comment = [reason, draft.comment.trim()].filter(Boolean).join(": ");
  const body = {
    verdict: draft.verdict, lease_token: item.lease_token, idempotency_key: draft.key, tags: draft.tags,
    spans: draft.spans.map((span) => toCharacters(item.output, span)), active_ms: draft.activeMs,
  };
  if (draft.verdict === "correct") body.correction = draft.text;
  if (draft.verdict === "prefer") body.preference = draft.preference;
  if (comment) body.comment = comment;
  return body;
}
