/* What `policy.keep_rest`, or where `cut` is true `policy.truncate_rest`, makes of one step with another beta:

     pi(t|a) = ref(t|a) exp(beta r(at)) ref(C|a) / sum_{c in C} ref(c|a) exp(beta r(ac))   for t in C, ref(t|a) otherwise
     cut:      the same without ref(C|a),                                                  and 0 otherwise

   A step without rewards was left to the reference: beta is 0 there. Returns the probability of each listed token, of
   all others together, and by how many nats guidance moved the token that was drawn. */
function guided(step, beta, cut) {
  const sum = (numbers) => numbers.reduce((total, one) => total + one, 0);
  const inside = step.candidates.filter((one) => one.candidate);
  const tilt = (one) => beta * (one.reward ?? 0);
  const score = (one) => Math.log(one.ref_prob) + tilt(one);
  const most = Math.max(...inside.map(score)); // taken off, so that nothing overflows
  const total = sum(inside.map((one) => Math.exp(score(one) - most)));
  const mass = cut ? 1 : sum(inside.map((one) => one.ref_prob));
  const outside = (one) => (cut ? 0 : one.ref_prob);
  const drawn = step.candidates.find((one) => one.drawn);
  return {
    probs: step.candidates.map((one) =>
      one.candidate ? (mass * Math.exp(score(one) - most)) / total : outside(one)),
    others: outside(step.others),
    nats: drawn.candidate ? tilt(drawn) + Math.log(mass) - most - Math.log(total) : cut ? -Infinity : 0,
  };
}

const asRecorded = ({ candidates, others, nats }) => ({ probs: candidates.map((one) => one.prob), others: others.prob, nats });

const nats = (x) => (x === -Infinity ? "−∞" : x.toFixed(2));

/* Let the controls of a text, hidden until now, move its numbers. */
function play(article, { settings, steps }) {
  const controls = article.querySelector(".controls");
  if (!controls) return; // the page says why
  const [slider, , cut] = controls.querySelectorAll("input");
  const cells = [...article.querySelectorAll("td.guided")];
  const bars = [...article.querySelectorAll("td.guided rect")];
  const words = [...article.querySelectorAll(".text a")];
  const total = article.querySelector(".total");
  const recorded = [total, ...cells].map((one) => one.firstChild.data);

  function show() {
    const near = Math.abs(slider.value - settings.beta) < slider.step / 2; // the slider's numbers are rounded
    const beta = near ? settings.beta : Number(slider.value);
    const written = near && cut.checked === settings.truncate;
    const now = steps.map(written ? asRecorded : (step) => guided(step, beta, cut.checked));
    const probs = now.flatMap(({ probs, others }, i) => (steps[i].rest ? [...probs, others] : probs));
    const texts = [nats(now.reduce((all, step) => all + step.nats, 0)), ...probs.map(number)];
    [total, ...cells].forEach((one, i) => (one.firstChild.data = written ? recorded[i] : texts[i]));
    bars.forEach((bar, i) => bar.setAttribute("width", `${(100 * probs[i]).toFixed(1)}%`));
    words.forEach((word, i) => {
      word.className = way(now[i].nats);
      word.title = `${now[i].nats < 0 ? "" : "+"}${nats(now[i].nats)} nats by guidance`;
    });
    controls.querySelector("b").textContent = String(Number(beta.toPrecision(4)));
    controls.querySelector("button").disabled = written;
  }

  controls.addEventListener("input", show);
  controls.querySelector("button").addEventListener("click", () => {
    for (const input of controls.querySelectorAll("input")) {
      input.value = input.defaultValue;
      input.checked = input.defaultChecked;
    }
    slider.focus(); // the button is disabled now
    show();
  });
  controls.hidden = false;
}

const texts = JSON.parse(document.getElementById("texts").textContent);
document.querySelectorAll("article").forEach((article, i) => play(article, texts[i]));
