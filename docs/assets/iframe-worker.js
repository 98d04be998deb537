/* Search where the site is opened from a folder. Browsers start no worker from a file, so there a hidden frame of the
   page runs the worker's script. It answers the same calls: postMessage, onmessage and the event "message". Given up:
   the search runs in the page's own thread. The name is the one that the theme's plugin `offline` looks for. */
if (location.protocol === "file:") {
  class FrameWorker extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.append(frame);
      this.inside = frame.contentWindow;
      this.inside.postMessage = data => this.#said("message", data);
      this.ready = new Promise((loaded, failed) => {
        const script = frame.contentDocument.createElement("script");
        script.src = url;
        script.onload = loaded;
        script.onerror = () => failed(new Error(`the worker ${url} cannot be loaded`));
        frame.contentDocument.head.append(script);
      });
      this.ready.catch(error => this.dispatchEvent(new ErrorEvent("error", {error, message: error.message})));
      this.end = () => frame.remove();
    }

    postMessage(data) {
      this.ready.then(() => this.inside.dispatchEvent(new MessageEvent("message", {data})), () => undefined);
    }

    terminate() {
      this.end();
    }

    #said(kind, data) {
      const event = new MessageEvent(kind, {data});
      this.dispatchEvent(event);
      if (typeof this.onmessage === "function") this.onmessage(event);
    }
  }
  window.IFrameWorker = FrameWorker;
  window.Worker = FrameWorker;
}
