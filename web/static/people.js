// Pages that show a secret once: copying it, and a reload that does not make another one.

import { toast } from "./app.js";

if (document.querySelector("[data-once-shown]")) history.replaceState(null, "", location.pathname.replace(/\/(invite|link|[\w-]+\/rotate)$/, ""));

async function copy(button) {
  const secret = document.getElementById(button.dataset.copy);
  try {
    await navigator.clipboard.writeText(secret.textContent);
    toast("Copied");
  } catch {
    // No clipboard over plain http or without permission: select the text, the rest is one key press.
    getSelection().selectAllChildren(secret);
    toast("Press Ctrl+C to copy");
  }
}

document.addEventListener("click", (event) => {
  const button = event.target.closest?.("[data-copy]");
  if (button) copy(button);
});
