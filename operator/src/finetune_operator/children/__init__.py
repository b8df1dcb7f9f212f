"""A plan as Kubernetes objects: ConfigMap, Service, Jobs and their pods. Pure."""
