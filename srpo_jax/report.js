// Pages, filters and sorts the cards of a browser, and goes along its moments; report.py puts it into the page, which is
// whole without it.
"use strict";
for (const browser of document.querySelectorAll(".browser")) {
  const size = 12; // cards on a page
  const controls = browser.querySelector(".controls").elements;
  const gallery = browser.querySelector(".gallery");
  const status = browser.querySelector("[role=status]");
  const cards = [...gallery.children].map((element) => ({
    element,
    prompt: element.dataset.prompt.toLowerCase(),
    category: element.dataset.category,
    numbers: JSON.parse(element.dataset.numbers),
  }));
  const moment = browser.querySelector(".moment");
  const slider = moment && moment.querySelector("[type=range]");
  const beside = moment && moment.querySelector("[type=checkbox]");
  let page = 0;

  function isShown(index) {
    return index === Number(slider.value) || (beside.checked && index === 0);
  }

  function move() {
    const name = cards[0].element.querySelectorAll(".stage-name")[slider.value].textContent;
    moment.querySelector("b").textContent = name;
    slider.setAttribute("aria-valuetext", name);
    browser.classList.toggle("beside", beside.checked);
    show();
  }

  function chosen() {
    const words = controls.words.value.toLowerCase().split(/\s+/).filter(Boolean);
    const category = controls.category ? controls.category.value : "";
    const found = cards.filter(
      (card) => words.every((word) => card.prompt.includes(word)) && (!category || card.category === category),
    );
    const order = controls.order ? controls.order.value : "";
    if (order) {
      const sign = order[0] === "-" ? -1 : 1;
      const column = Number(order.slice(1));
      const known = found.filter((card) => card.numbers[column] !== null);
      const unknown = found.filter((card) => card.numbers[column] === null);
      known.sort((a, b) => sign * (a.numbers[column] - b.numbers[column]));
      return [...known, ...unknown];
    }
    return found;
  }

  function show() {
    const found = chosen();
    const last = Math.max(0, Math.ceil(found.length / size) - 1);
    page = Math.min(Math.max(page, 0), last);
    gallery.replaceChildren(...found.slice(page * size, (page + 1) * size).map((card) => card.element));
    const view = controls.view ? controls.view.value : "";
    gallery.classList.toggle("matrix", view !== "");
    for (const card of cards) {
      card.element.querySelectorAll(".stage").forEach((stage, index) => {
        stage.hidden = slider ? !isShown(index) : view !== "" && index !== Number(view);
      });
    }
    status.textContent = `page ${page + 1} of ${last + 1}, ${found.length} of ${cards.length} prompts`;
    controls.back.disabled = page === 0;
    controls.next.disabled = page === last;
  }

  function turn(pages) {
    page += pages;
    show();
  }

  const form = browser.querySelector(".controls");
  form.hidden = false;
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", () => turn(-page));
  controls.back.addEventListener("click", () => turn(-1));
  controls.next.addEventListener("click", () => turn(1));
  if (moment) {
    moment.hidden = false;
    browser.classList.add("sliding");
    moment.addEventListener("input", move);
    move();
  } else {
    show();
  }
}
