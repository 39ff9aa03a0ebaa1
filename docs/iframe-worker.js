// The search of a site that is opened from a folder: browsers start no Worker there, so its script runs in a hidden frame.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      frame.srcdoc = "<!doctype html>";
      this.started = new Promise(started => frame.addEventListener("load", async () => {
        const inside = frame.contentWindow;
        const load = script => new Promise((done, failed) => {
          const element = inside.document.createElement("script");
          Object.assign(element, { src: script, onload: done, onerror: failed });
          inside.document.body.append(element);
        });
        inside.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }));
        inside.importScripts = async (...scripts) => { for (const script of scripts) await load(script); };
        await load(url);
        started(inside);
      }));
      document.body.append(frame);
    }
    postMessage(data) {
      this.started.then(inside => inside.dispatchEvent(new inside.MessageEvent("message", { data })));
    }
  };
}
