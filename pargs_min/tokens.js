"use strict";

/* What pages with tokens and their candidates share: numbers as `trace.py` writes them, and which way guidance went. */
const number = (p) => (p >= 0.001 || p === 0 ? p.toFixed(3) : p.toExponential(0).replace(/-(\d)$/, "-0$1"));
const way = (nats) => (nats > 0.1 ? "up" : nats < -0.1 ? "down" : "same");
