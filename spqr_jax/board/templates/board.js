"use strict";
// The tables are complete without this: it sorts and filters them.
const all = (selector, root = document) => [...root.querySelectorAll(selector)];

// Sorting: headings become buttons. Rows without the figure are last whichever way.
function sort(th, direction) {
  const body = th.closest("table").tBodies[0], column = th.cellIndex, sign = direction === "ascending" ? 1 : -1;
  const value = (tr) => {
    const cell = tr.cells[column];
    if (th.dataset.sort === "text") return cell.textContent.trim().toLowerCase();
    return cell.dataset.value === undefined ? null : Number(cell.dataset.value);
  };
  const rows = [...body.rows].map((tr) => [value(tr), tr]);
  rows.sort(([a], [b]) => {
    if (a === null || b === null) return (a === null) - (b === null);
    return sign * (typeof a === "string" ? (a < b ? -1 : a > b ? 1 : 0) : a - b);
  });
  for (const other of th.parentElement.cells) other.removeAttribute("aria-sort");
  th.setAttribute("aria-sort", direction);
  body.append(...rows.map(([, tr]) => tr));
}
for (const th of all(".board th[data-sort]")) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "sorter";
  button.append(...th.childNodes);
  th.append(button);
  button.addEventListener("click", () => {
    const now = th.getAttribute("aria-sort"), first = th.dataset.first;
    sort(th, now === first ? (first === "ascending" ? "descending" : "ascending") : first);
  });
}

// Filters: tables by their conditions, rows by their text, division and kind.
const form = document.getElementById("filters");
if (form) {
  const tables = all("section.table").map((section) => ({
    section,
    rows: all(".board tbody tr", section).map((tr) => ({
      tr, text: `${tr.cells[0].textContent} ${tr.querySelector(".ids").textContent}`.toLowerCase(),
    })),
  }));
  const total = tables.reduce((sum, { rows }) => sum + rows.length, 0);
  function filter() {
    const wanted = form.elements, words = wanted.search.value.trim().toLowerCase();
    const narrowed = words !== "" || wanted.division.value !== "" || !wanted.controls.checked;
    let count = 0;
    for (const { section, rows } of tables) {
      const other = ["protocol", "backbone", "scenario", "profile"].some(
        (name) => wanted[name] && wanted[name].value !== "" && wanted[name].value !== section.dataset[name]);
      let here = 0;
      for (const { tr, text } of rows) {
        const fits = !other && text.includes(words) && (wanted.controls.checked || tr.dataset.control === undefined) &&
          (wanted.division.value === "" || wanted.division.value === tr.dataset.division);
        tr.classList.toggle("out", !fits);
        here += fits;
      }
      section.classList.toggle("out", other || (narrowed && here === 0));
      count += here;
    }
    document.getElementById("count").textContent = count === total ? `${total} rows` : `${count} of ${total} rows`;
    document.getElementById("nothing").classList.toggle("off", count > 0 || total === 0);
  }
  form.reset();
  form.hidden = false;
  form.addEventListener("input", filter);
  form.addEventListener("change", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  // A link to a row or table leads there whatever the filters.
  window.addEventListener("hashchange", () => {
    const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (target && target.closest(".out")) {
      form.reset();
      filter();
      target.scrollIntoView();
    }
  });
  filter();
}
