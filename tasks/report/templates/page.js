"use strict";
for (const box of document.querySelectorAll("[data-filter]")) {
  const field = box.querySelector("input");
  const count = box.querySelector("[data-count]");
  const items = Array.from(document.querySelectorAll("[data-item]"));
  const more = document.querySelector("[data-more]");
  const none = document.querySelector("[data-none]");
  const show = () => {
    const words = field.value.toLocaleLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const item of items) {
      const text = item.textContent.toLocaleLowerCase();
      item.hidden = !words.every((word) => text.includes(word));
      shown += item.hidden ? 0 : 1;
    }
    if (more && words.length) more.open = true;
    if (none) none.hidden = shown > 0;
    count.textContent = `${shown} of ${items.length} texts`;
  };
  field.addEventListener("input", show);
  box.hidden = false;
  show();
}
for (const button of document.querySelectorAll("[data-copy]")) {
  const source = document.getElementById(button.dataset.copy);
  const said = button.parentElement.querySelector("[data-said]");
  const select = () => {
    const range = document.createRange();
    range.selectNodeContents(source);
    const selection = window.getSelection();
    selection.removeAllRanges();
    selection.addRange(range);
  };
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(source.textContent);
      said.textContent = "Copied.";
    } catch {
      select();
      said.textContent = "Selected: copy it with your keyboard.";
    }
  });
  button.hidden = false;
}
