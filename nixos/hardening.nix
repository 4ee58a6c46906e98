# The sandbox of the relay. `systemd-analyze security` computes the exposure score from these settings; the findings that
# remain are listed at the end with their reasons.
{ config, lib, ... }:

lib.mkIf config.services.atproto-relay.enable {
  systemd.services.atproto-relay.serviceConfig = {
    # No privileges, and no way to gain any.
    AmbientCapabilities = "";
    CapabilityBoundingSet = "";
    NoNewPrivileges = true;
    RestrictSUIDSGID = true;
    PrivateUsers = true;
    LockPersonality = true;
    KeyringMode = "private";
    RestrictNamespaces = true;
    RestrictRealtime = true;

    # Files: the relay writes only to its own two folders, and reads only files readable by every user.
    ProtectSystem = "strict";
    ProtectHome = true;
    PrivateTmp = true;
    PrivateMounts = true;
    UMask = "0077";
    RemoveIPC = true;

    # The kernel and its interfaces.
    ProtectClock = true;
    ProtectControlGroups = true;
    ProtectHostname = true;
    ProtectKernelLogs = true;
    ProtectKernelModules = true;
    ProtectKernelTunables = true;
    ProtectProc = "invisible";
    PrivateDevices = true;
    DevicePolicy = "closed";

    # System calls. No code is generated at run time, so no page needs to be both writable and executable.
    MemoryDenyWriteExecute = true;
    SystemCallArchitectures = "native";
    SystemCallFilter = [
      "@system-service"
      # Raising the soft limit of open files (prlimit64) is in @system-service, not in @resources.
      "~@privileged @resources"
    ];
    # A forbidden call fails with EPERM instead of killing the relay.
    SystemCallErrorNumber = "EPERM";

    # The network. systemd owns the listeners (sockets.nix), so the relay and injected code cannot bind ports.
    RestrictAddressFamilies = [
      "AF_INET"
      "AF_INET6"
      "AF_UNIX"
    ];
    SocketBindDeny = "any";

    # Remaining findings, with their weights:
    # - PrivateNetwork (0.5), AF_INET and AF_INET6 (0.3), IPAddressDeny (0.2): the relay dials every PDS. It checks the
    #   addresses itself, after DNS and on each redirect, and dials only public ones. A list here could not allow the
    #   machine's resolver and deny its neighbours.
    # - DeviceAllow (0.1): ProtectClock= allows reading the clock's device, but PrivateDevices= removes the file.
    # - ProcSubset (0.1): the start time of the process is computed from /proc/stat, and alerts on restarts need it. Other
    #   users' processes are invisible nevertheless (ProtectProc=).
    # - AF_UNIX (0.1): PostgreSQL, the journal, systemd and the name service cache use Unix sockets.
    # - RootDirectory (0.1): the program is in the Nix store, so it cannot have a root directory of its own.
  };
}
