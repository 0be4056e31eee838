// The bottom line: how far, how fast, what became of the last judgement, and whether it is stored.

import { element } from "./text.js";

const WHY = {
  negative_feedback: "negative feedback", low_confidence: "low confidence", schema_failure: "a schema failure",
  disagreement: "disagreement", novelty: "novelty", uniform: "the uniform audit", chosen: "somebody who sent it here",
};

// What anchors a judgement, and is told after it.
export function told(reveal) {
  const weights = reveal.adapter_digest ? reveal.adapter_digest.slice(0, 10) : "the base model";
  const noted = reveal.again ? " You had spoken of it before, as the only lead: noted." : "";
  return `Answered by ${weights}; chosen ${reveal.strategy === "chosen" ? "by" : "for"} ${WHY[reveal.strategy] ?? reveal.strategy}.${noted}`;
}

export class Bar {
  constructor(at, slug) {
    this.at = at;
    this.slug = slug;
  }

  reveal(judged) {
    const area = this.at("reveal");
    if (!judged) {
      area.replaceChildren();
      return;
    }
    const answer = judged.reveal;
    const link = element("a", "", "See it");
    link.href = `/p/${this.slug}/interactions/${answer.interaction_id}`;
    link.target = "_blank";
    const text = element("span", "told", told(answer));
    text.title = text.textContent;
    area.replaceChildren(text, link);
    if (answer.adjudicates && !answer.again) area.append(this.#goldButton());
  }

  #goldButton() {
    const gold = element("button", "btn small quiet", "Check reviewers by it");
    gold.type = "button";
    gold.dataset.do = "gold";
    gold.title = "Show it, unmarked, to reviewers who have not seen it, and count how often they are right";
    return gold;
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
}
