// The interactions list by keyboard, ticking answers for a bulk action, and copying a request.

import { toast, writes } from "./app.js";

const links = () => [...document.querySelectorAll("[data-list] .row-link")];

function move(step) {
  const all = links();
  if (!all.length) return;
  const now = all.indexOf(document.activeElement);
  const next = all[Math.min(Math.max(now + step, 0), all.length - 1)];
  next.focus();
  next.closest("tr").scrollIntoView({ block: "nearest" });
}

function tick() {
  const box = document.activeElement.closest?.("tr")?.querySelector("input[name=id]");
  if (!box) return;
  box.checked = !box.checked;
  count();
}

const keys = {
  j: () => move(1),
  k: () => move(-1),
  x: tick,
  "/": () => document.querySelector("[data-search]")?.focus(),
  u: () => document.querySelector("[data-back]")?.click(),
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (writes(event.target, "input:not([type=checkbox]), select, textarea") || document.querySelector("dialog[open]")) return;
  const act = keys[event.key];
  if (!act) return;
  event.preventDefault();
  act();
});

// --- ticking ----------------------------------------------------------------------------------------------

const boxes = () => [...document.querySelectorAll("[data-picking] input[name=id]")];

function count() {
  const shown = document.querySelector("[data-picked]");
  if (shown) shown.textContent = String(boxes().filter((box) => box.checked).length);
}

document.addEventListener("change", (event) => {
  if (event.target.matches("[data-pick-all]")) boxes().forEach((box) => { box.checked = event.target.checked; });
  if (event.target.matches("[data-bulk-do]")) showTag();
  count();
});

function showTag() {
  const chosen = document.querySelector("[data-bulk-do]");
  if (!chosen) return;
  const field = document.querySelector("[data-bulk-tag]");
  field.hidden = chosen.value !== "tag";
  field.required = !field.hidden;
}

// A page that comes back from the history keeps its ticks.
addEventListener("pageshow", () => { count(); showTag(); });

// --- addresses that say only what was chosen --------------------------------------------------------------

const USUAL = { mode: "both", window: "all" };
const searching = document.querySelector("form[role=search]");

searching?.addEventListener("submit", () => {
  for (const field of searching.elements) {
    if (field.name && (field.value === "" || field.value === USUAL[field.name])) field.disabled = true;
  }
});

addEventListener("pageshow", () => {
  for (const field of searching?.elements ?? []) field.disabled = false;
});

// --- what leaves the page ---------------------------------------------------------------------------------

document.addEventListener("click", async (event) => {
  const button = event.target.closest?.("[data-copy]");
  if (!button) return;
  try {
    await navigator.clipboard.writeText(document.getElementById(button.dataset.copy).textContent);
    toast("Copied");
  } catch {
    toast("The browser allows no copying here; open the raw request and select it.", "bad");
  }
});

document.addEventListener("submit", (event) => {
  if ("closes" in event.target.dataset) event.target.closest("dialog").close();
});
