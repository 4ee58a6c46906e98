//! One TLS configuration for everything the relay dials, built once and shared.
//! Mozilla's roots come with the binary; roots of the system are trusted as well, so that a private authority works.

use std::sync::{Arc, OnceLock};

use rustls::{ClientConfig, RootCertStore};

/// The shared client configuration: TLS 1.2 and 1.3, Mozilla's roots and the system's (or those of `SSL_CERT_FILE`).
pub fn client_config() -> Arc<ClientConfig> {
    static CONFIG: OnceLock<Arc<ClientConfig>> = OnceLock::new();
    CONFIG.get_or_init(|| Arc::new(build())).clone()
}

fn build() -> ClientConfig {
    let mut roots = RootCertStore::empty();
    roots.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned());
    let system = rustls_native_certs::load_native_certs();
    let (added, ignored) = roots.add_parsable_certificates(system.certs);
    tracing::debug!(
        added,
        ignored,
        "loaded the system's certificate authorities"
    );
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("ring supports TLS 1.2 and 1.3")
        .with_root_certificates(roots)
        .with_no_client_auth()
}
