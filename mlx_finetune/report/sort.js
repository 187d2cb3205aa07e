"use strict";
// A heading of a table that can be sorted holds a button; a second press turns the order round.
document.querySelectorAll("table.sortable").forEach((table) => {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const name = head.textContent;
    if (!name) return;
    const button = document.createElement("button");
    button.type = "button";
    button.setAttribute("aria-label", `Sort by ${name}`);
    head.setAttribute("aria-sort", "none");
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => { if (other.hasAttribute("aria-sort")) other.setAttribute("aria-sort", "none"); });
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      sort(table.tBodies[0], column, down ? -1 : 1);
    });
  });
});

// Numbers by their value, the rest as text; what has no value stands last either way.
function sort(body, column, direction) {
  const keys = new Map([...body.rows].map((row) => [row, key(row.cells[column])]));
  const numbers = [...keys.values()].some((value) => typeof value === "number");
  const rows = [...body.rows].sort((a, b) => {
    const [one, other] = [keys.get(a), keys.get(b)];
    if (!numbers) return direction * one.localeCompare(other);
    const [no, none] = [typeof one !== "number", typeof other !== "number"];
    return no || none ? no - none : direction * (one - other);
  });
  body.append(...rows);
}

function key(cell) {
  return "value" in cell.dataset ? Number(cell.dataset.value) : cell.textContent;
}

// What scrolls can be reached by the keyboard, in browsers that do not see to it themselves.
function reachable() {
  document.querySelectorAll(".text, .wide, .commands").forEach((box) => {
    if (box.scrollHeight > box.clientHeight + 1 || box.scrollWidth > box.clientWidth + 1) box.tabIndex = 0;
    else box.removeAttribute("tabindex");
  });
}
document.querySelectorAll("details").forEach((details) => details.addEventListener("toggle", reachable));
window.addEventListener("resize", reachable);
reachable();
