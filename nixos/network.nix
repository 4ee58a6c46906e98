# The kernel's settings for a machine with thousands of long-lived connections, a few of them busy.
{ config, lib, ... }:

let
  cfg = config.services.atproto-relay;
in
{
  options.services.atproto-relay.network.tune = lib.mkOption {
    type = lib.types.bool;
    default = true;
    description = ''
      Whether to set the kernel's network settings for many long-lived connections. Each is a default: what is set in
      {option}`boot.kernel.sysctl` wins.
    '';
  };

  config = lib.mkIf (cfg.enable && cfg.network.tune) {
    # BBR paces by the bandwidth it measures: a consumer on the other side of the world, behind a line that loses a packet
    # now and then, keeps its rate, where cubic would halve it at each loss. fq is the queue that paces for it.
    boot.kernelModules = [ "tcp_bbr" ];
    boot.kernel.sysctl = lib.mapAttrs (_: lib.mkDefault) {
      "net.ipv4.tcp_congestion_control" = "bbr";
      "net.core.default_qdisc" = "fq";

      # After a restart all consumers come back within a second. The queue of complete connections (somaxconn) is as long
      # as the sockets ask for, and the sizes of buffers are the kernel's own: both are large enough by default.
      "net.ipv4.tcp_max_syn_backlog" = 8192;

      # What lies in a socket unsent cannot be dropped for a consumer that falls behind, and it is memory times the number
      # of consumers. The relay has the log to send from, so a socket needs no more than this.
      "net.ipv4.tcp_notsent_lowat" = 131072;

      # A firehose is quiet at times; without this each pause would send it back to the beginning of its window.
      "net.ipv4.tcp_slow_start_after_idle" = 0;
      # Hosts behind tunnels that swallow the messages about packet sizes would stall for ever.
      "net.ipv4.tcp_mtu_probing" = 1;
      # Peers that vanished free their descriptors within some five minutes, not two hours.
      "net.ipv4.tcp_keepalive_time" = 120;
      "net.ipv4.tcp_keepalive_intvl" = 30;
      "net.ipv4.tcp_keepalive_probes" = 6;
    };
  };
}
