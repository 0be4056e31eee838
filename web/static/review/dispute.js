// What the judges of a disputed item said, side by side and unnamed, for the lead who decides.

import { difference, element } from "./text.js";

const SAID = {
  accept: "accepted it", correct: "corrected it", reject: "rejected it", prefer: "compared them",
};
const PREFERRED = { left: "The left one is better.", right: "The right one is better.", tie: "They are equal." };
const NAMES = ["First", "Second", "Third", "Fourth", "Fifth"];

export function cards(item, draft, letters) {
  return item.dispute.map((said, place) => card(item, draft, letters, said, place));
}

function card(item, draft, letters, said, place) {
  const made = element("article", "said");
  const heading = element("header", "");
  const who = said.mine ? "You" : `${NAMES[place] ?? `${place + 1}th`} reviewer`;
  heading.append(element("h3", "", `${who} ${SAID[said.verdict]}`));
  const take = element("button", "btn small");
  take.type = "button";
  take.dataset.do = `adopt ${place}`;
  take.append("Decide so ");
  if (place < 2) {
    const key = element("kbd", "", document.querySelector(`[data-key-of="${["left", "right"][place]}"]`)?.textContent ?? "");
    take.append(key);
  }
  heading.append(take);
  made.append(heading);
  if (said.verdict === "correct") {
    const change = element("div", "diff");
    change.append(...difference(item.output, said.correction, letters).nodes);
    made.append(change);
  } else if (said.preference) made.append(element("p", "", PREFERRED[said.preference]));
  if (said.spans.length) {
    const spans = said.spans.map((span) => `“${span.quote.slice(0, 60)}”${span.tag ? ` ${span.tag}` : ""}`);
    made.append(element("p", "small muted", `Flagged ${spans.join(", ")}`));
  }
  if (said.tags.length) made.append(element("p", "small muted", said.tags.join(", ")));
  if (said.comment) made.append(element("p", "small", said.comment));
  return made;
}
