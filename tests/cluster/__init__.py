"""A real Kubernetes cluster for the tests, on one machine, without an image registry.

- ``build`` builds the pinned binaries from Go modules, once.
- ``control_plane`` starts etcd, the API server, the controllers and the scheduler on loopback,
  without root. Its pods stay Pending unless a test or ``kwok`` writes their status.
- ``real`` adds nodes with containerd and kubelet, each in its own namespaces; needs root.
- ``images`` builds images from the project's Dockerfiles, directly into the nodes' stores.
- ``fixtures`` are the pytest fixtures; ``python -m cluster up`` starts a cluster by hand.

Every process is recorded in a folder (``state``) by process id and start time, so that a later run
can stop what a killed run left behind.
"""
