// What every page shares: theme, live parts, dialogs, confirmed and measured forms, toasts.

export function toast(text, kind = "") {
  const note = document.createElement("div");
  note.className = `toast ${kind}`;
  note.textContent = text;
  document.querySelector("[data-toasts]").append(note);
  setTimeout(() => note.remove(), kind === "bad" ? 8000 : 4500);
}

export function remember(key, value) {
  try {
    if (value === null) localStorage.removeItem(key);
    else localStorage.setItem(key, value);
    return true;
  } catch {
    return false; // storage is full or switched off; callers say so where it matters
  }
}

export function recall(key) {
  try {
    return localStorage.getItem(key);
  } catch {
    return null;
  }
}

// Whether a key pressed at `element` writes there. A field that was hidden keeps the focus until the next frame.
export function writes(element, fields = "input, select, textarea") {
  return element.matches?.(fields) && element.checkVisibility();
}

// --- live parts: the server renders the same template again, the page swaps it in -------------------------

async function refresh(part) {
  const response = await fetch(part.dataset.live, { headers: { accept: "text/html" } });
  if (response.redirected || response.status === 401) location.assign("/sign-in");
  if (!response.ok) return;
  const fresh = await response.text();
  // Not under somebody's hands: an open dialog or a focused field stays as it is.
  if (fresh === part.last || part.querySelector("dialog[open], :focus-visible, details[open]")) return;
  part.last = fresh;
  const parsed = new DOMParser().parseFromString(fresh, "text/html");
  part.replaceChildren(...parsed.body.childNodes);
}

function keepLive(part) {
  const every = Number(part.dataset.every);
  const turn = async () => {
    if (part.querySelector("[data-live-stop]")) return;
    if (!document.hidden) {
      try {
        await refresh(part);
      } catch {
        // The server is away for a moment; the next turn asks again.
      }
    }
    setTimeout(turn, every);
  };
  setTimeout(turn, every);
}

document.querySelectorAll("[data-live]").forEach(keepLive);

// --- clicks ------------------------------------------------------------------------------------------------

document.addEventListener("click", (event) => {
  const at = (selector) => event.target.closest?.(selector);
  if (at("[data-theme-toggle]")) {
    const next = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    document.documentElement.dataset.theme = next;
    remember("whet:theme", next);
  }
  const opener = at("[data-open-dialog]");
  if (opener) document.getElementById(opener.dataset.openDialog).showModal();
  if (at("[data-close-dialog]")) at("dialog").close();
  const tint = at("[data-tint-toggle]");
  if (tint) showTint(tint);
  const open = document.querySelector(".switcher[open]");
  if (open && !open.contains(event.target)) open.open = false;
});

// --- one key: a button says which one presses it ----------------------------------------------------------------

document.addEventListener("keydown", (event) => {
  if (event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
  if (writes(event.target) || document.querySelector("dialog[open]")) return;
  const button = [...document.querySelectorAll("[data-key]")].find((one) => one.dataset.key === event.key);
  if (!button) return;
  event.preventDefault();
  button.click();
});

function showTint(button) {
  const shown = button.getAttribute("aria-pressed") !== "true";
  button.setAttribute("aria-pressed", String(shown));
  button.textContent = shown ? "Hide probabilities" : "Show probabilities";
  const area = button.closest("[data-tint]");
  area.querySelector("[data-tint-plain]").hidden = shown;
  area.querySelectorAll("[data-tint-tokens]").forEach((element) => { element.hidden = !shown; });
}

// --- forms -------------------------------------------------------------------------------------------------

document.addEventListener("submit", (event) => {
  const form = event.target;
  if (form.dataset.confirm && !confirm(form.dataset.confirm)) event.preventDefault();
  else if (form.dataset.measure) {
    event.preventDefault();
    submitMeasured(form);
  } else if ("once" in form.dataset) form.querySelector("button").disabled = true;
});

document.querySelectorAll("form[data-submit-on-change] select").forEach((select) => {
  select.addEventListener("change", () => select.form.requestSubmit());
});

async function submitMeasured(form) {
  const began = performance.now();
  try {
    const response = await fetch(form.action, {
      method: "POST", body: new FormData(form), headers: { accept: "application/json" },
    });
    const taken = Math.round(performance.now() - began);
    const answer = await response.json();
    form.closest("dialog")?.close();
    if (response.ok) toast(`${form.dataset.measure} ${taken} ms`);
    else toast(answer.error.message, "bad");
  } catch {
    toast("The console cannot be reached; nothing was changed.", "bad");
  }
  const part = document.querySelector("[data-live]");
  if (part) await refresh(part);
}
