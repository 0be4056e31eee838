// The sum of the strategies' shares while a lead types them; the server checks them again.

const form = document.querySelector("[data-mix]");

function tell() {
  const shares = [...form.querySelectorAll("[data-share]")].map((input) => input.valueAsNumber || 0);
  const sum = Math.round(10 * shares.reduce((total, share) => total + share, 0)) / 10;
  const line = form.querySelector("[data-mix-sum]");
  line.textContent = sum === 100 ? "The shares add up to 100 %." : `The shares add up to ${sum} %; it takes 100.`;
  line.classList.toggle("bad-text", sum !== 100);
  form.querySelector("button").disabled = sum !== 100;
}

if (form) {
  form.addEventListener("input", tell);
  tell();
}
