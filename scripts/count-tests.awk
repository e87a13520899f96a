# Passes `cargo test` output through and ends with one line that says how many tests ran.
{ print; fflush() }
/^test result: / {
    gsub(/[;.]/, " ")
    for (i = 1; i < NF; i++) {
        if ($(i + 1) == "passed") passed += $i
        if ($(i + 1) == "failed") failed += $i
        if ($(i + 1) == "ignored") ignored += $i
    }
    binaries++
}
END {
    printf "test result: %d passed, %d failed, %d ignored in %d test programs\n", passed, failed, ignored, binaries
}
