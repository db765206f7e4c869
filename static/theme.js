// Before the first paint, so that nothing flashes: the appearance chosen here, or the system's, and its changes.
{
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const paint = () => {
    let chosen = null;
    try {
      chosen = JSON.parse(localStorage.getItem("faces.theme"));
    } catch { /* storage may be forbidden */ }
    document.documentElement.dataset.theme = chosen || (dark.matches ? "dark" : "light");
  };
  dark.addEventListener("change", paint);
  addEventListener("theme", paint);
  paint();
}
