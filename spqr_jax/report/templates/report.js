"use strict";
// Everything the page needs is already in it; this only sorts, filters, shows and hides. Without it, pictures stay blurred.
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const state = { backbone: "", profile: "", scenario: "", slice: "", form: document.body.dataset.headline };

// Filters: what carries data-backbone, -profile or -scenario is hidden when it belongs to another one ("" belongs to all).
function filter() {
  for (const node of all("[data-backbone], [data-profile], [data-scenario]")) {
    const { backbone, profile, scenario, slice } = node.dataset;
    const other = (wanted, own) => wanted !== "" && own !== undefined && own !== "" && own !== wanted;
    const outside = other(state.backbone, backbone) || other(state.profile, profile) || other(state.scenario, scenario);
    node.classList.toggle("off", outside || (slice !== undefined && slice !== state.slice));
  }
}
for (const select of all("select[data-filter]")) {
  select.value = "";
  select.addEventListener("change", () => { state[select.dataset.filter] = select.value; filter(); });
}

// The form of R and SPQR.
function form(name) {
  state.form = name;
  document.body.classList.toggle("exponential", name === "exponential");
  const sorted = document.querySelector(".board th[aria-sort] button");
  if (sorted) sort(sorted, sorted.closest("th").getAttribute("aria-sort"));
}
for (const input of all("input[name=form]")) {
  input.checked = input.value === state.form;
  input.addEventListener("change", () => form(input.value));
}

// Sorting: figures by value, best guess first; rows without the figure last whichever way.
function sort(button, direction) {
  const th = button.closest("th"), row = th.parentElement, body = th.closest("table").tBodies[0];
  const column = [...row.cells].indexOf(th), sign = direction === "ascending" ? 1 : -1;
  const value = (tr) => {
    const cell = tr.cells[column];
    if (button.dataset.sort === "text") return cell.textContent.trim().toLowerCase();
    const text = cell.dataset[state.form] ?? cell.dataset.logistic;
    return text === undefined || (cell.querySelector(".form-exponential") && cell.dataset[state.form] === undefined) ? null : Number(text);
  };
  const rows = [...body.rows].map((tr) => [value(tr), tr]);
  rows.sort(([a], [b]) => {
    if (a === null || b === null) return (a === null) - (b === null);
    return sign * (typeof a === "string" ? a.localeCompare(b) : a - b);
  });
  for (const other of row.cells) other.removeAttribute("aria-sort");
  th.setAttribute("aria-sort", direction);
  body.append(...rows.map(([, tr]) => tr));
}
for (const button of all(".board button[data-sort]")) {
  button.addEventListener("click", () => {
    const now = button.closest("th").getAttribute("aria-sort");
    const first = button.dataset.sort === "text" ? "ascending" : "descending";
    const second = first === "ascending" ? "descending" : "ascending";
    sort(button, now === first ? second : first);
  });
}

// Method tabs: click or arrow keys.
const tabs = all("[role=tab]");
function select(tab) {
  for (const other of tabs) {
    const chosen = other === tab;
    other.setAttribute("aria-selected", String(chosen));
    other.tabIndex = chosen ? 0 : -1;
    document.getElementById(other.getAttribute("aria-controls")).classList.toggle("off", !chosen);
  }
}
tabs.forEach((tab, i) => {
  tab.addEventListener("click", () => select(tab));
  tab.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const next = tabs[(i + step + tabs.length) % tabs.length];
    select(next);
    next.focus();
    event.preventDefault();
  });
});

// Gallery: a few prompts at a time, so that thousands of pictures stay quick.
const PER_PAGE = 4;
const groups = all(".group"), choices = document.getElementById("gallery-filters");
let place = 0;
function gallery() {
  if (!choices) return;
  const { subject, role, category, changed } = choices.elements;
  const fits = (group) =>
    (role.value === "" || group.dataset.role === role.value) &&
    (!category || category.value === "" || group.dataset.category === category.value) &&
    (!changed.checked || group.dataset.changed !== "");
  const shown = groups.filter(fits), last = Math.max(0, Math.ceil(shown.length / PER_PAGE) - 1);
  place = Math.min(Math.max(place, 0), last);
  const page = new Set(shown.slice(place * PER_PAGE, (place + 1) * PER_PAGE));
  for (const group of groups) group.classList.toggle("off", !page.has(group));
  for (const strip of all(".strip")) strip.classList.toggle("off", subject.value !== "" && strip.dataset.subject !== subject.value);
  const from = shown.length ? place * PER_PAGE + 1 : 0;
  document.getElementById("gallery-place").textContent = `prompts ${from}–${Math.min((place + 1) * PER_PAGE, shown.length)} of ${shown.length}`;
  for (const button of all("[data-step]")) button.disabled = button.dataset.step === "1" ? place === last : place === 0;
}
function reveal(picture, shown) {
  picture.classList.toggle("shown", shown);
  picture.setAttribute("aria-pressed", String(shown));
}
const veiled = all(".veiled");
for (const picture of veiled) picture.addEventListener("click", () => reveal(picture, !picture.classList.contains("shown")));
if (choices) {
  choices.reset();
  choices.addEventListener("submit", (event) => event.preventDefault());
  choices.addEventListener("change", (event) => {
    if (event.target.name === "reveal") veiled.forEach((picture) => reveal(picture, event.target.checked));
    else { place = 0; gallery(); }
  });
  for (const button of all("[data-step]")) button.addEventListener("click", () => { place += Number(button.dataset.step); gallery(); });
}
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  veiled.forEach((picture) => reveal(picture, false));
  if (choices) choices.elements.reveal.checked = false;
});
gallery();

// Light or dark: the reader's system decides until the button is pressed.
document.getElementById("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});
