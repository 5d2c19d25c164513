"use strict";
// A slider shows one image of its row.
for (const viewer of document.querySelectorAll(".viewer")) {
  const slider = viewer.querySelector("input[type=range]");
  const output = viewer.querySelector("output");
  const images = [...viewer.querySelectorAll("img")];
  if (!slider) continue;
  const show = () => {
    const chosen = images[Number(slider.value)];
    images.forEach((image) => { image.hidden = image !== chosen; });
    output.textContent = chosen.dataset.epoch;
    slider.setAttribute("aria-valuetext", "epoch " + chosen.dataset.epoch);
  };
  slider.addEventListener("input", show);
  slider.closest(".slider").hidden = false;
  show();
}
// A button copies the command beside it.
for (const button of document.querySelectorAll(".copy")) {
  const code = button.parentElement.querySelector("code");
  button.hidden = false;
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(code);
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  });
}
