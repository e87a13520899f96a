# Passes `cargo test` output through; ends with what the failed tests said, and one line that says how many tests ran.
{ print; fflush() }
/^---- .* stdout ----$/ { is_failure = 1 }
/^failures:$/ { is_failure = 0 }
is_failure { said = said $0 "\n" }
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
    if (said != "") printf "\n%s\n", said
    printf "test result: %d passed, %d failed, %d ignored in %d test programs\n", passed, failed, ignored, binaries
}
