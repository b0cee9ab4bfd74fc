# Where the images are, for build and run.  Set here before sourcing.
cache=${CARGO_TARGET_DIR:-$here/../../target}/xen
mkdir -p "$cache"
cache=$(cd "$cache" && pwd) img=$cache/images
