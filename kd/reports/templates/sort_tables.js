// A click on a heading sorts its table. Without scripts the page lacks nothing else.
for (const table of document.querySelectorAll("table.data")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  const key = (row, at) => { const v = row.cells[at].dataset.v; return v === undefined ? row.cells[at].textContent : v === "" ? NaN : +v; };
  heads.forEach((head, at) => {
    if (head.dataset.fixed !== undefined || body.rows.length < 2) return;
    const sort = () => {
      const falling = head.getAttribute("aria-sort") === "descending" || (!head.hasAttribute("aria-sort") && !head.classList.contains("n"));
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", falling ? "ascending" : "descending");
      [...body.rows].sort((a, b) => {
        const x = key(a, at), y = key(b, at);
        if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
        return (falling ? 1 : -1) * (typeof x === "number" ? x - y : x.localeCompare(y));
      }).forEach(row => body.append(row));
    };
    head.classList.add("sortable");
    head.tabIndex = 0;
    head.addEventListener("click", sort);
    head.addEventListener("keydown", event => { if (event.key === "Enter") sort(); });
  });
}
