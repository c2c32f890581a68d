"use strict";
// A page in a frame tells the page around it how tall it is.
new ResizeObserver(() => {
  parent.postMessage({ height: Math.ceil(document.body.getBoundingClientRect().height) }, "*");
}).observe(document.body);
