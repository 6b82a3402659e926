// A figure whose cell is tagged frames-CxR is a sheet of C by R frames. This script shows one frame at a time, with
// buttons and a slider. Without the script, and in print, the reader sees the whole sheet. The sheet is drawn by
// nflows_lib.experiments.sheets.filmstrip.
document.addEventListener("DOMContentLoaded", () => {
  for (const cell of document.querySelectorAll('div.cell[class*="tag_frames-"]')) {
    const [, columns, rows] = cell.className.match(/tag_frames-(\d+)x(\d+)/).map(Number);
    const image = cell.querySelector("img");
    if (!image) continue;
    const view = document.createElement("div");
    view.className = "frames-view";
    image.replaceWith(view);
    view.append(image);
    image.style.width = `${100 * columns}%`;

    const bar = document.createElement("div");
    bar.className = "frames-bar";
    bar.innerHTML =
      '<button type="button" aria-label="previous frame">◀</button>' +
      `<input type="range" min="1" max="${columns * rows}" value="1" aria-label="frame">` +
      '<button type="button" aria-label="next frame">▶</button><output aria-live="polite"></output>';
    view.after(bar);
    const [previous, slider, next, where] = bar.children;

    const show = (frame) => {
      const last = Number(slider.max);
      const now = Math.min(Math.max(frame, 1), last);
      slider.value = now;
      const column = (now - 1) % columns;
      const row = Math.floor((now - 1) / columns);
      image.style.transform = `translate(${(-100 * column) / columns}%, ${(-100 * row) / rows}%)`;
      where.textContent = `${now} of ${last}`;
    };
    previous.addEventListener("click", () => show(Number(slider.value) - 1));
    next.addEventListener("click", () => show(Number(slider.value) + 1));
    slider.addEventListener("input", () => show(Number(slider.value)));

    // A frame's proportions follow from the sheet's, which are known once the sheet has loaded.
    const fit = () => {
      view.style.aspectRatio = `${image.naturalWidth / columns} / ${image.naturalHeight / rows}`;
      show(1);
    };
    if (image.complete) fit();
    else image.addEventListener("load", fit);
  }
});
