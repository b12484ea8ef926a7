// Saved widgets find their modules beside the page instead of on a delivery network.
{
  const vendor = document.documentElement.dataset.content_root + "_static/vendor/";
  require.config({ paths: { anywidget: vendor + "anywidget" } });
  const manager = document.createElement("script");
  manager.dataset.jupyterWidgetsCdn = vendor;
  manager.src = vendor + "@jupyter-widgets/html-manager/dist/embed-amd.js";
  document.head.append(manager);
}
