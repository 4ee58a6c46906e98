# The dashboard, as Grafana reads it. Rows go from the service to its parts: health, events, drops, hosts, consumers, then
# log, database, directories, machine. The grid is computed from the order of the panels.
{ lib }:

let
  datasource = {
    type = "prometheus";
    uid = "atproto-relay-prometheus";
  };

  # Labels of every query: the machine chosen at the top.
  relay = ''job="atproto-relay",instance="$instance"'';
  metric = name: "${name}{${relay}}";
  with' = name: labels: "${name}{${relay},${labels}}";
  per = name: "rate(${name}[$__rate_interval])";
  quantile =
    q: histogram:
    "histogram_quantile(${toString q}, sum by (le) (${per (metric "${histogram}_bucket")}))";

  query = legend: expr: { inherit legend expr; };
  targets = lib.imap0 (
    index: query: {
      inherit datasource;
      inherit (query) expr;
      legendFormat = query.legend;
      refId = lib.substring index 1 "ABCDEFGHIJ";
    }
  );

  panel = type: width: height: title: description: unit: queries: more: {
    inherit type title description;
    inherit datasource width height;
    targets = targets queries;
    fieldConfig = {
      defaults = {
        inherit unit;
      }
      // more.defaults or { };
      overrides = [ ];
    };
    options = more.options or { };
  };

  # Lines over time.
  graph =
    title: description: unit: queries:
    panel "timeseries" 8 8 title description unit queries {
      defaults = {
        min = 0;
        custom = {
          fillOpacity = 10;
          showPoints = "never";
        };
      };
      options = {
        legend = {
          showLegend = true;
          displayMode = "list";
          placement = "bottom";
          calcs = [ ];
        };
        tooltip = {
          mode = "multi";
          sort = "desc";
        };
      };
    };

  # One number; the steps are the values where its colour changes.
  number =
    title: description: unit: expr: steps:
    panel "stat" 4 4 title description unit [ (query "" expr) ] {
      defaults.thresholds = {
        mode = "absolute";
        steps = steps;
      };
      options = {
        colorMode = "background";
        graphMode = "area";
        reduceOptions = {
          calcs = [ "lastNotNull" ];
          values = false;
        };
      };
    };
  # The current samples: a row for each series, a column for each of its labels except the hidden ones.
  table =
    width: height: title: description: expr: hidden:
    let
      asGraph = panel "table" width height title description "none" [ (query "" expr) ] {
        options.showHeader = true;
      };
      now = {
        format = "table";
        instant = true;
        range = false;
      };
    in
    asGraph
    // {
      targets = map (target: target // now) asGraph.targets;
      transformations = [
        {
          id = "organize";
          options.excludeByName = lib.genAttrs hidden (_: true);
        }
      ];
    };
  step = color: value: { inherit color value; };
  upTo = yellow: red: [
    (step "green" null)
    (step "yellow" yellow)
    (step "red" red)
  ];
  atLeast = green: [
    (step "red" null)
    (step "green" green)
  ];
  plain = [ (step "blue" null) ];

  rows = [
    {
      title = "Health";
      panels = [
        (number "Relay" "1: its metrics can be read." "none" (metric "up") (atLeast 1))
        (number "Events a second" "Events appended to the firehose." "short"
          "sum(${per (metric "relay_events_forwarded_total")})"
          (atLeast 0.01)
        )
        (number "Lag behind the hosts"
          "Median time from the creation of an event at its host until it is in the log."
          "s"
          (metric "relay_lag_seconds")
          (upTo 10 60)
        )
        (number "Hosts connected" "Including those that are read more slowly because of a limit." "short"
          "sum(${with' "relay_hosts" ''state=~"connected|held_back"''})"
          (atLeast 1)
        )
        (number "Consumers" "Connected to the firehose." "short" (metric "relay_consumers") plain)
        (number "Replay window" "Age of the oldest event in the log." "s"
          (metric "relay_log_oldest_age_seconds")
          plain
        )
        (table 24 5 "Firing alerts" "Empty when all is well."
          ''ALERTS{alertstate="firing",instance=~"$instance|"}''
          [
            "Time"
            "Value"
            "__name__"
            "alertstate"
            "job"
          ]
        )
      ];
    }
    {
      title = "Events";
      panels = [
        (graph "Events in and out" "Received from hosts, and forwarded to the firehose." "eps" [
          (query "received" "sum(${per (metric "relay_events_received_total")})")
          (query "forwarded" "sum(${per (metric "relay_events_forwarded_total")})")
        ])
        (graph "Forwarded by kind" "Nearly all are commits." "eps" [
          (query "{{kind}}" "sum by (kind) (${per (metric "relay_events_forwarded_total")})")
        ])
        (graph "Time through the relay" "From the arrival of an event until consumers can read it." "s" [
          (query "p50" (quantile 0.5 "relay_time_to_firehose_seconds"))
          (query "p99" (quantile 0.99 "relay_time_to_firehose_seconds"))
        ])
      ];
    }
    {
      title = "Drops";
      panels = [
        (graph "Drops by rule" "The journal names hosts and accounts: journalctl RELAY_RULE=…" "eps" [
          (query "{{rule}}" "sum by (rule) (${per (metric "relay_events_dropped_total")}) > 0")
        ])
        (graph "Broken chains and gaps"
          "Chains: events forwarded although they do not continue the account's chain of commits. Gaps: hosts that no longer had the events after our cursor."
          "short"
          [
            (query "chains an hour" "increase(${metric "relay_events_desynchronized_total"}[1h])")
            (query "gaps an hour" "increase(${metric "relay_upstream_gaps_total"}[1h])")
            (query "cursors from the future an hour" "increase(${metric "relay_upstream_future_cursors_total"}[1h])")
          ]
        )
        (graph "Ignored"
          "Frames of an unknown type, events received a second time, relays that announced themselves as a host."
          "eps"
          [
            (query "unknown" (per (metric "relay_upstream_ignored_total")))
            (query "duplicates" (per (metric "relay_upstream_already_durable_total")))
            (query "relays" (per (metric "relay_upstream_relays_refused_total")))
          ]
        )
      ];
    }
    {
      title = "Hosts";
      panels = [
        (graph "Hosts by state" "waiting: a retry is due soon; offline: retries have failed for long."
          "short"
          [
            (query "{{state}}" "sum by (state) (${metric "relay_hosts"})")
          ]
        )
        (graph "Disconnects and limits"
          "A host above its rate is read more slowly; none of its events is dropped."
          "short"
          [
            (query "disconnects a minute" "60 * ${per (metric "relay_upstream_disconnects_total")}")
            (query "held back a minute" "60 * ${per (metric "relay_upstream_held_back_total")}")
          ]
        )
        (graph "Memory of in-flight events"
          "own: each host's own; shared: borrowed by hosts for moments; parked: waiting for a look-up. Waits: sockets waiting for shared memory."
          "short"
          [
            (query "{{part}} bytes" (metric "relay_upstream_memory_bytes"))
            (query "waits a minute" "60 * ${per (metric "relay_upstream_memory_waits_total")}")
          ]
        )
        (graph "Crawl requests" "Hosts that announce themselves with requestCrawl." "short" [
          (query "{{outcome}} an hour" "increase(${metric "relay_crawl_requests_total"}[1h])")
        ])
      ];
    }
    {
      title = "Consumers";
      panels = [
        (graph "Consumers" "Refused: over a limit. Too slow: fell out of the replay window." "short" [
          (query "connected" (metric "relay_consumers"))
          (query "admitted a minute" "60 * ${per (metric "relay_consumers_admitted_total")}")
          (query "refused a minute" "60 * ${per (metric "relay_consumers_refused_total")}")
          (query "too slow an hour" "increase(${metric "relay_consumers_too_slow_total"}[1h])")
          (query "disconnected for {{reason}} an hour" "increase(${metric "relay_consumers_cut_total"}[1h])")
          (query "held back a minute" "60 * ${per (metric "relay_consumers_held_back_total")}")
          (query "other connections closed for {{reason}} an hour" "increase(${metric "relay_http_connections_closed_total"}[1h])")
        ])
        (graph "Lag behind the log"
          "The slowest and the median consumer. A slow consumer costs no memory: it reads older pages of the log."
          "short"
          [
            (query "{{of}}" (metric "relay_consumer_lag_events"))
          ]
        )
        (graph "Bytes sent" "To all consumers together, including WebSocket headers." "Bps" [
          (query "bytes" (per (metric "relay_consumer_bytes_total")))
        ])
        (graph "Handover at restarts"
          "Consumers resumed from the previous process, and those that could not be resumed."
          "short"
          [
            (query "{{outcome}}" (metric "relay_consumers_handed_over_total"))
          ]
        )
        (graph "Events sent" "To all consumers together." "eps" [
          (query "events" (per (metric "relay_consumer_events_total")))
        ])
      ];
    }
    {
      title = "Log";
      panels = [
        (graph "Writes" "A write with its fdatasync; many events share one." "s" [
          (query "p50" (quantile 0.5 "relay_log_write_seconds"))
          (query "p99" (quantile 0.99 "relay_log_write_seconds"))
        ])
        (graph "Window"
          "Age of the oldest event beside the configured window. If it is lower, log.max_bytes or the free space is the limit."
          "s"
          [
            (query "oldest event" (metric "relay_log_oldest_age_seconds"))
            (query "replay_window" (metric "relay_log_window_seconds"))
          ]
        )
        (graph "Size" "The log, its limit, and the free space of its disk." "bytes" [
          (query "log" (metric "relay_log_bytes"))
          (query "log.max_bytes" (metric "relay_log_max_bytes"))
          (query "free on the disk" (metric "relay_log_disk_free_bytes"))
          (query "reserved" (metric "relay_log_min_free_bytes"))
          (query "disk" (metric "relay_log_disk_bytes"))
        ])
        (graph "Redactions" "Accounts whose events are removed from the log after a deletion or a takedown."
          "short"
          [
            (query "pending" (metric "relay_log_redactions_pending"))
            (query "done a minute" "60 * ${per (metric "relay_log_redactions_total")}")
          ]
        )
        (graph "Sequence numbers"
          "Sequence numbers are dense, so the difference is the number of events in the log."
          "short"
          [
            (query "in the log" "${metric "relay_log_seq"} - ${metric "relay_log_oldest_seq"}")
            (query "not yet durable" (metric "relay_log_durable_lag_events"))
            (query "not yet stored by {{view}}" (metric "relay_view_lag_events"))
          ]
        )
        (graph "Segments removed" "age: normal; bytes or room: the window is shorter than configured."
          "short"
          [
            (query "{{reason}} an hour" "increase(${metric "relay_log_segments_removed_total"}[1h])")
          ]
        )
        (graph "Failures"
          "failing: 1 while the log accepts no events; retried: writes repeated after an error."
          "short"
          [
            (query "failing" (metric "relay_log_failing"))
            (query "retried a minute" "60 * ${per (metric "relay_log_write_errors_total")}")
          ]
        )
      ];
    }
    {
      title = "Database";
      panels = [
        (graph "Pending changes" "At 40,000 the relay stops reading from the hosts." "short" [
          (query "pending" (metric "relay_store_queue"))
          (query "failing" (metric "relay_store_failing"))
        ])
        (graph "Batches"
          "Time of a batch, batches repeated after an error, and public reads that found no free connection."
          "s"
          [
            (query "p50" (quantile 0.5 "relay_store_flush_seconds"))
            (query "p99" (quantile 0.99 "relay_store_flush_seconds"))
            (query "retried a minute" "60 * ${per (metric "relay_store_flush_errors_total")}")
            (query "public reads refused a minute" "60 * ${per (metric "relay_store_reads_refused_total")}")
          ]
        )
        (graph "Account cache misses"
          "Share of the events whose account is not in memory. If it is high, raise account_cache."
          "percentunit"
          [
            (query "misses" "${per (metric "relay_account_cache_misses_total")} / (${per (metric "relay_account_cache_hits_total")} + ${per (metric "relay_account_cache_misses_total")})")
          ]
        )
      ];
    }
    {
      title = "Identities";
      panels = [
        (graph "Look-ups"
          "unavailable: an error of the directory; not found and invalid: a fault of the account."
          "ops"
          [
            (query "{{method}} {{outcome}}" "sum by (method, outcome) (${per (metric "relay_identity_lookups_total")})")
            (query "status at the PDS" (per (metric "relay_status_lookups_total")))
          ]
        )
        (graph "Look-up time" "The directory's time plus the network." "s" [
          (query "p50" (quantile 0.5 "relay_identity_lookup_seconds"))
          (query "p99" (quantile 0.99 "relay_identity_lookup_seconds"))
        ])
        (graph "Parked events and cached identities" "Parked events wait for a look-up." "short" [
          (query "parked" "sum(${metric "relay_shard_parked"})")
          (query "cached identities" (metric "relay_identity_cache_entries"))
        ])
        (graph "Queued look-ups" "Hosts share the look-up slots." "short" [
          (query "{{kind}}" (metric "relay_lookups_waiting"))
        ])
        (graph "Identity cache hits" "Share of the look-ups that the cache answers." "percentunit" [
          (query "hits" "${per (metric "relay_identity_cache_hits_total")} / (${per (metric "relay_identity_cache_hits_total")} + ${per (metric "relay_identity_cache_misses_total")})")
        ])
      ];
    }
    {
      title = "Machine";
      panels = [
        (graph "Processor" "Busy cores. A shard is one thread." "short" [
          (query "cores" (per (metric "process_cpu_seconds_total")))
        ])
        (graph "Shard queues"
          "Long on all shards: the processor is too slow. Long on one: a single account is the cause."
          "short"
          [
            (query "shard {{shard}}" (metric "relay_shard_queue"))
          ]
        )
        (graph "Memory" "Resident memory of the process, without the page cache of the log." "bytes" [
          (query "resident" (metric "process_resident_memory_bytes"))
        ])
        (graph "Accounts in memory" "By shard. Under memory pressure the caches shrink." "short" [
          (query "shard {{shard}}" (metric "relay_shard_residents"))
          (query "shrinks" (metric "relay_memory_pressure_total"))
        ])
        (graph "Open files" "One for each consumer and each host." "short" [
          (query "open" (metric "process_open_fds"))
          (query "limit" (metric "process_max_fds"))
        ])
        (graph "Restarts and reloads"
          "Restarts and reloads within an hour, parts without progress, problems that /_health reports, settings that need a restart."
          "short"
          [
            (query "restarts" "changes(${metric "process_start_time_seconds"}[1h])")
            (query "reloads {{outcome}}" "increase(${metric "relay_config_reloads_total"}[1h])")
            (query "last reload refused" (metric "relay_config_reload_failed"))
            (query "settings that need a restart" (metric "relay_config_restart_needed"))
            (query "stuck: {{part}}" (metric "relay_watchdog_stuck"))
            (query "problem: {{name}}" (metric "relay_problem"))
          ]
        )
        (graph "Start" "Recovery steps of the last start, and the running version." "short" [
          (query "recovery steps" (metric "relay_recovery_steps_total"))
          (query "version {{version}}" (metric "relay_build_info"))
        ])
        (graph "Disks" "Mean time of a request by device." "s" [
          (query "write {{device}}" ''rate(node_disk_write_time_seconds_total{job="atproto-relay-node",instance="$instance"}[$__rate_interval]) / rate(node_disk_writes_completed_total{job="atproto-relay-node",instance="$instance"}[$__rate_interval])'')
          (query "read {{device}}" ''rate(node_disk_read_time_seconds_total{job="atproto-relay-node",instance="$instance"}[$__rate_interval]) / rate(node_disk_reads_completed_total{job="atproto-relay-node",instance="$instance"}[$__rate_interval])'')
        ])
        (graph "Network" "All traffic of the machine." "Bps" [
          (query "out {{device}}" ''rate(node_network_transmit_bytes_total{job="atproto-relay-node",instance="$instance",device!="lo"}[$__rate_interval])'')
          (query "in {{device}}" ''rate(node_network_receive_bytes_total{job="atproto-relay-node",instance="$instance",device!="lo"}[$__rate_interval])'')
        ])
      ];
    }
  ];

  # Panels go from left to right; one that does not fit starts a new line. A row heading is one line high.
  columns = 24;
  place =
    state: panel:
    let
      fits = state.x + panel.width <= columns;
      x = if fits then state.x else 0;
      y = if fits then state.y else state.y + state.tallest;
      placed =
        removeAttrs panel [
          "width"
          "height"
        ]
        // {
          inherit (state) id;
          gridPos = {
            inherit x y;
            w = panel.width;
            h = panel.height;
          };
        };
    in
    {
      id = state.id + 1;
      x = x + panel.width;
      inherit y;
      tallest = if fits then lib.max state.tallest panel.height else panel.height;
      panels = state.panels ++ [ placed ];
    };
  placeRow =
    state: row:
    let
      y = state.y + state.tallest;
      heading = {
        type = "row";
        inherit (row) title;
        inherit (state) id;
        collapsed = false;
        panels = [ ];
        gridPos = {
          x = 0;
          inherit y;
          w = columns;
          h = 1;
        };
      };
    in
    lib.foldl' place {
      id = state.id + 1;
      x = 0;
      y = y + 1;
      tallest = 0;
      panels = state.panels ++ [ heading ];
    } row.panels;
  placed = lib.foldl' placeRow {
    id = 1;
    x = 0;
    y = 0;
    tallest = 0;
    panels = [ ];
  } rows;
in
{
  uid = "atproto-relay";
  title = "AT Protocol relay";
  tags = [ "atproto" ];
  timezone = "utc";
  editable = false;
  refresh = "30s";
  schemaVersion = 39;
  version = 1;
  time = {
    from = "now-6h";
    to = "now";
  };
  templating.list = [
    {
      name = "instance";
      label = "Machine";
      type = "query";
      inherit datasource;
      query = ''label_values(up{job="atproto-relay"}, instance)'';
      refresh = 1;
      sort = 1;
    }
  ];
  inherit (placed) panels;
}
