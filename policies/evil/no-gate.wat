(component
  ;; Exports nothing.
)
