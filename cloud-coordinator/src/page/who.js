"use strict";
// Who is logged in: shown on every page but the one to log in on. The name is only ever set as text.

function signIn() {
  sessionStorage.setItem("next", location.href);
  location.replace("login");
}

// Nothing if the coordinator is away; the page says that itself.
async function whoAmI() {
  try {
    const answer = await fetch("api/v1/me");
    if (answer.status === 401) signIn();
    return answer.ok ? await answer.json() : null;
  } catch {
    return null;
  }
}

const me = whoAmI();

me.then((who) => {
  const place = document.getElementById("me");
  if (!who || !place) return;
  const name = document.createElement("span");
  name.textContent = `${who.name} · ${who.role}${who.site ? ` of ${who.site}` : ""}`;
  const out = document.createElement("button");
  out.type = "button";
  out.id = "logout";
  out.textContent = "log out";
  out.addEventListener("click", async () => {
    out.disabled = true;
    try {
      await fetch("api/v1/logout", { method: "POST" });
      sessionStorage.removeItem("next");
      location.replace("login");
    } catch {
      // The coordinator is away: nobody is logged out.
      out.disabled = false;
    }
  });
  place.replaceChildren(name, out);
});
