// The schema check, away from the page: a pattern that never ends holds up nobody (`checker.js` ends this worker).

import { problemsOf } from "./schema.js";

addEventListener("message", ({ data: { number, text, schema, original } }) => {
  let problems;
  try {
    problems = problemsOf(text, schema, original);
  } catch {
    problems = null; // a schema no check is written for, or one that is none
  }
  postMessage({ number, problems });
});
postMessage({ ready: true });
