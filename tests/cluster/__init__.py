"""A real Kubernetes cluster for the tests, on one machine, without an image registry.

- ``build`` builds the pinned binaries from Go modules, once.
- ``control_plane`` starts etcd, the API server, the controllers and the scheduler on loopback;
  needs no root. Its pods stay Pending until a test (or kwok) says otherwise.
- ``nodes`` adds nodes with containerd and kubelet, each in namespaces of its own; needs root.
- ``images`` builds images from the project's Dockerfiles, straight into the nodes' stores.
- ``fixtures`` offers all of it to pytest; ``python -m cluster up`` to a person.

Everything that runs is recorded in a folder (``state``) from which a later run can stop it, by
process id and start time, should this one be killed.
"""
