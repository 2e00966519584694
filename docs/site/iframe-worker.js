// The search runs in a worker, which browsers do not start on pages that are read from a folder. There, a hidden frame
// with the same script takes its place.
if (location.protocol === "file:") {
  window.IFrameWorker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.append(frame);
      this.view = frame.contentWindow;
      this.view.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      const script = this.view.document.createElement("script");
      this.loaded = new Promise((resolve) => script.addEventListener("load", resolve));
      script.src = url;
      this.view.document.body.append(script);
    }

    postMessage(data) {
      this.loaded.then(() => this.view.dispatchEvent(new MessageEvent("message", { data })));
    }

    terminate() {
      this.view.frameElement.remove();
    }
  };
  window.Worker = window.IFrameWorker;
}
